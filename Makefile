# Baton's commands. The ones you need: make setup, make check, make test, make demo.
#
#   PYTHON       the interpreter to build .venv with; 3.11 or later
#   TORCH_SPEC   which torch to install
#   TORCH_INDEX  where from, e.g. https://download.pytorch.org/whl/cpu where the default index would give a CUDA build
#   CHAOS        options of make bench-chaos
#   ROWS         rows of make bench (all), PEER: the environment with vLLM in it, BENCH: more options

PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=

BIN := .venv/bin
PACKAGES := $(wildcard baton kv_transfer ranks prefill_node decode_node router cluster simulator bench)
READY := .venv/.ready
NATIVE := baton/engine/devices/native kv_transfer/native
KERNELS := build/.kernels
PROTO_READY := .venv-proto/.ready
PIP := -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := check
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: setup kernels proto lifecycles format format-check lint types check test test-full fuzz demo bench bench-micro bench-w8a8 bench-chaos clean

setup: $(READY) $(KERNELS)

$(READY): pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Baton needs Python 3.11 or later, and '$(PYTHON)' is not: name one with make PYTHON=python3.11"; exit 1; }
	@echo "[1/3] creating .venv with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv .venv
	@echo "[2/3] installing $(TORCH_SPEC) (the largest download) ..."
	@$(BIN)/python $(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)"
	@echo "[3/3] installing Baton, what it needs and its development tools ..."
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Ready: .venv/bin/baton is the command, make check and make test prove it."

# Installing builds the kernels too; this is for those who change them. Without a C compiler there are none, and torch serves.
kernels: $(KERNELS)

$(KERNELS): $(READY) $(wildcard $(NATIVE:=/*.c) $(NATIVE:=/*.h)) $(NATIVE:=/build.py)
	@for directory in $(NATIVE); do $(BIN)/python $$directory/build.py || exit 1; done
	@mkdir -p $(@D) && touch $@

# The generator has a virtual environment of its own: stubs of this version import on protobuf 3.20 to 7.x.
$(PROTO_READY): Makefile
	@echo "creating .venv-proto with grpcio-tools 1.62.3 ..."
	@$(PYTHON) -m venv .venv-proto
	@.venv-proto/bin/python $(PIP) grpcio-tools==1.62.3 'setuptools<81'
	@touch $@

proto: $(PROTO_READY)
	.venv-proto/bin/python -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. --pyi_out=. proto/baton/v1/*.proto

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy $(PACKAGES)

check: format-check lint types $(PROTO_READY) $(KERNELS)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not relay and not slow and not demo"

# pytest calls an empty selection an error, rightly; so the marked tests run from the day there is one.
test: check
ifneq ($(shell grep -rlE 'mark\.(relay|demo)\b' tests --include='*.py'),)
	$(BIN)/python -m pytest -m "(relay or demo) and not slow"
else
	@echo "no test is marked relay or demo yet"
endif

test-full: test
ifneq ($(shell grep -rlE 'mark\.slow\b' tests --include='*.py'),)
	$(BIN)/python -m pytest -m slow
else
	@echo "no test is marked slow yet"
endif

# Every parser that faces a socket or a file, a hundred times as hard as in make check: an hour or two.
fuzz: $(READY) $(KERNELS)
	$(BIN)/python -m pytest --hypothesis-profile=long --timeout 0 tests/fuzz

demo: $(READY) $(KERNELS)
	@$(BIN)/python -m cluster.demo

lifecycles: $(READY)
	$(BIN)/python -m cluster.lifecycles > docs/lifecycles.md.new
	mv docs/lifecycles.md.new docs/lifecycles.md

# Side by side with vLLM where PEER says it is (bench/peer_vllm.sh DIR), else Baton alone: make bench PEER=DIR ROWS="50-50-128 bound"
bench: $(READY) $(KERNELS)
	@$(BIN)/python -m bench.suite $(if $(PEER),--peer $(PEER)) $(BENCH) $(ROWS)

bench-w8a8: $(READY) $(KERNELS)
	@$(BIN)/python -m bench.w8a8

# Kernels and transports beside the machine's limits, cost as work grows; then pulls on a running cluster. Minutes.
bench-micro: $(READY) $(KERNELS)
	@$(BIN)/python -m bench.micro $(MICRO)
	@$(BIN)/python -m bench.pull

# Minutes. CHAOS takes more: make bench-chaos CHAOS="--requests 200 --faults 10 --untimed"; --help lists all.
bench-chaos: $(READY) $(KERNELS)
	@$(BIN)/python -m bench.chaos $(CHAOS)

clean:
	rm -rf build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf $(NATIVE:=/built)
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
