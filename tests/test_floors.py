"""The house holds: imports go down only, neighbours are strangers, and libraries come in through their doors.

The tables below are the rule (see CONTRIBUTING.md); everything under them only reads the source. To add a module, give it a
room here. Imports under `TYPE_CHECKING`, inside functions and by `import_module("...")` count like any other.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A room may import itself and any room on a lower floor, nothing else. Patterns are whole paths; `/**` is
# everything below. Floor 2 is three steps: wire < rpc < client.
FLOORS: list[dict[str, list[str]]] = [
    {
        "basement": [
            "baton/__init__.py",
            *(
                f"baton/{name}.py"
                for name in ("request", "config", "errors", "deadline", "lifecycle", "tokenizer", "detokenizer", "telemetry")
            ),
        ]
    },
    {"stubs": ["baton/v1/**"]},
    {"wire": ["baton/wire.py"]},
    {"rpc": ["baton/rpc.py"]},
    {"client": ["baton/client.py"]},
    {"kv_transfer": ["kv_transfer/**"], "engine": ["baton/engine/**"]},
    {"ranks": ["ranks/**"]},
    {"router": ["router/**"], "prefill_node": ["prefill_node/**"], "decode_node": ["decode_node/**"]},
    {"cluster": ["cluster/**"], "simulator": ["simulator/**"]},
    {"bench": ["bench/**"]},
    {"command": ["baton/__main__.py"]},
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
TOPS: list[str] = PROJECT["hatch"]["build"]["targets"]["wheel"]["packages"]
# Directories at the root with Python that is no part of the house: nobody in the house imports them.
OUTSIDE = ("tests", "demo")

# The simulator stands in for grpc itself: in memory, in virtual time, with faults.
GRPC_FILES = [
    *(f"simulator/{name}.py" for name in ("network", "serving", "stream")),
    "bench/instant_nodes.py",  # stands in for nodes
    *("baton/rpc.py", "baton/client.py", "*/service.py"),
    *("router/nodes.py", "router/said.py", "ranks/control.py", "kv_transfer/server.py", "kv_transfer/client.py", "kv_transfer/line.py"),
]
NOWHERE: list[str] = []
DOORS: dict[str, list[str]] = {
    "ray": ["cluster/**", "bench/chaos/hosts.py"],
    "torch_npu": ["baton/engine/devices/npu*.py"],
    "grpc": [*GRPC_FILES, "baton/v1/**"],
    "grpc_health": GRPC_FILES,
    "grpc_reflection": GRPC_FILES,
    "grpc_status": GRPC_FILES,
    "google.protobuf": ["baton/wire.py", *GRPC_FILES, "baton/v1/**"],
    "baton.v1": ["baton/wire.py", *GRPC_FILES, "baton/v1/**"],
    "starlette": ["router/web.py", "router/web_*.py"],
    "uvicorn": ["router/web.py", "router/web_*.py"],
    "pickle": NOWHERE,
    "cloudpickle": NOWHERE,
    "dill": NOWHERE,
}

# What decides is pure: plain values in, a plan out.
PURE = [
    "*/scheduler.py",
    "baton/engine/shares.py",
    "router/policy.py",
    "ranks/remembered.py",
    "prefill_node/step.py",
    "ranks/silence.py",
    "router/life.py",
    "router/membership.py",
    "router/failures.py",
    "decode_node/pull.py",
    "decode_node/stages.py",
    "decode_node/step.py",
    "cluster/supervision.py",
    "router/admission.py",
    "router/compare.py",
    "kv_transfer/layout.py",
    "kv_transfer/lease.py",
    "kv_transfer/reshard.py",
    "ranks/capacity.py",
    "ranks/layouts.py",
    "cluster/plan.py",
    "baton/engine/blocks.py",
    "baton/engine/fits.py",
    "baton/engine/placement.py",
    "baton/engine/kv_shape.py",
]
IMPURE = ("torch", "time", "asyncio", "threading", "multiprocessing", "socket", "subprocess", "os")

# Importing all of these must not bring any of those along.
LIGHT = ["baton/__init__.py", "baton/*.py", "baton/v1/*.py", "router/**"]
HEAVY = ("torch", "torch_npu", "transformers")


@cache
def sources() -> list[str]:
    """Every Python file of the packages, relative to the root, stubs for type checkers included."""
    found = [path for top in TOPS for path in (ROOT / top).rglob("*.py*") if path.suffix in (".py", ".pyi")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def matches(path: str, patterns: list[str]) -> bool:
    """Whether a whole path fits a pattern; `*` stays within one directory, a trailing `/**` does not."""
    return any(
        path.startswith(pattern[:-2]) if pattern.endswith("/**") else path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)
        for pattern in patterns
    )


def room_of(path: str) -> tuple[int, str] | None:
    """The (floor, room) a file belongs to."""
    for floor, rooms in enumerate(FLOORS):
        for room, patterns in rooms.items():
            if matches(path, patterns):
                return floor, room
    return None


def module_of(path: str) -> str:
    """`router/web.py` -> `router.web`."""
    return path.removesuffix("i").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def file_of(module: str) -> str | None:
    """The file that importing a dotted name of ours runs last; None for a third party, a package directory or an attribute."""
    path = ROOT / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if module.split(".")[0] in TOPS and candidate.is_file():
            return candidate.relative_to(ROOT).as_posix()
    return None


def imported_by(node: ast.AST, package: list[str]) -> Iterator[str]:
    """The dotted names one syntax node imports; `from a import b` gives `a` and `a.b`, since b may be a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


@cache
def imports(path: str) -> list[tuple[int, str]]:
    """Every (line, dotted name) a file imports, wherever in the file it does so."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
    package = Path(path).parent.as_posix().split("/")
    nodes = ((getattr(node, "lineno", 0), node) for node in ast.walk(tree))
    return [(line, name) for line, node in nodes for name in imported_by(node, package)]


def within(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def test_every_package_is_known_everywhere() -> None:
    found = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    unknown = found - set(TOPS) - set(OUTSIDE)
    assert not unknown, f"give them a floor in FLOORS and list them in pyproject.toml and the Makefile: {unknown}"
    assert PROJECT["mypy"]["files"] == TOPS
    assert f"$(wildcard {' '.join(TOPS)})" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_nobody_imports_what_is_outside() -> None:
    wrong = [f"{path}:{line} {name}" for path in sources() for line, name in imports(path) if name.split(".")[0] in OUTSIDE]
    assert not wrong, wrong


def test_every_module_has_a_room() -> None:
    homeless = [path for path in sources() if room_of(path) is None]
    assert not homeless, f"give them a room in FLOORS: {homeless}"


def test_imports_go_down_and_neighbours_are_strangers() -> None:
    wrong = []
    for path in sources():
        mine = room_of(path)
        for line, name in imports(path):
            target = file_of(name)
            theirs = room_of(target) if target else None
            if mine and theirs and theirs != mine and theirs[0] >= mine[0]:
                wrong.append(f"{path}:{line} imports {name}, and {theirs[1]} is not below {mine[1]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", DOORS)
def test_library_comes_in_through_its_door(library: str) -> None:
    wrong = [
        f"{path}:{line} imports {name}; only {DOORS[library] or 'nobody'} may"
        for path in sources()
        if not matches(path, DOORS[library])
        for line, name in imports(path)
        if within(name, library)
    ]
    assert not wrong, "\n".join(wrong)


def test_decisions_are_pure() -> None:
    wrong = [
        f"{path}:{line} decides, and imports {name}"
        for path in sources()
        if matches(path, PURE)
        for line, name in imports(path)
        if any(within(name, impure) for impure in IMPURE)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_front_is_light() -> None:
    modules = [module_of(path) for path in sources() if matches(path, LIGHT) and path.endswith(".py")]
    program = f"""if True:
        import importlib, sys
        for module in {modules}:
            importlib.import_module(module)
            heavy = [name for name in {HEAVY} if name in sys.modules]
            assert not heavy, f"importing {{module}} brings {{heavy}} along"
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_the_test_sees_an_import_wherever_it_hides() -> None:
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\nimportlib.import_module('h.i')\nif TYPE_CHECKING:\n import j\n"
    )
    seen = {name for node in ast.walk(ast.parse(source)) for name in imported_by(node, ["top", "sub"])}
    assert seen == {"a.b", "c", "c.d", "top.sub", "top.sub.e", "top.f", "top.f.g", "h.i", "j"}


@pytest.mark.parametrize(
    ("path", "patterns", "fits"),
    [
        ("router/service.py", ["*/service.py"], True),
        ("baton/engine/service.py", ["*/service.py"], False),
        ("cluster/a/b.py", ["cluster/**"], True),
        ("baton/engine/devices/npu_moe.py", ["baton/engine/devices/npu*.py"], True),
    ],
)
def test_patterns_are_whole_paths(path: str, patterns: list[str], fits: bool) -> None:
    assert matches(path, patterns) is fits
