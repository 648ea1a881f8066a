"""The products that are timed are those of the model, and nothing but them."""

from functools import partial
from pathlib import Path

import pytest
import torch

from baton.engine.config_json import load_spec
from bench.micro.gemm import Recording, gemm_only, rows
from bench.micro.limits import Limits
from bench.solo import Solo
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("models") / "dense", dtype="bfloat16")


def recorded(model_dir: Path, num_rows: int) -> list[partial[torch.Tensor]]:
    recording = Recording()
    solo = Solo(model_dir, "bfloat16", "none", num_rows, 4, recording)
    prompts = torch.zeros(num_rows, 2, dtype=torch.int64).numpy()
    with torch.inference_mode():
        products = recording.of(lambda _: solo.rank.forward(solo.step(prompts, 0)))
        solo.rank.forward(solo.step(prompts, 0))  # not asked for, so not kept
    return products


def test_a_dense_models_products_are_four_a_layer_and_the_head(dense: Path) -> None:
    spec, products = load_spec(dense), recorded(dense, 3)
    assert len(products) == 4 * spec.num_layers + 1
    outs = [tuple(product().shape) for product in products]
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    of_all = [(6, qkv), (6, spec.hidden), (6, spec.intermediate), (6, spec.hidden)]
    of_the_last_layer = [(6, qkv), (3, spec.hidden), (3, spec.intermediate), (3, spec.hidden)]
    assert outs == of_all * (spec.num_layers - 1) + of_the_last_layer + [(3, spec.vocab)]


def test_experts_are_among_them(tiny_moe: Path) -> None:
    spec, names = load_spec(tiny_moe), [product.func.__name__ for product in recorded(tiny_moe, 1)]
    assert names.count("experts") == sum(spec.sparse(layer) for layer in range(spec.num_layers)) > 0


def test_every_step_that_is_asked_for_takes_time(dense: Path) -> None:
    taken = gemm_only(dense, "bfloat16", [(1, 1), (2, 3)])
    assert len(taken) == 2 and min(taken) > 0


def test_the_table(dense: Path) -> None:
    limits = Limits()
    limits.memory_bytes_per_s, limits.bf16_flops, limits.fp32_flops = 1e10, 1e11, 5e10  # known, so not measured
    found = list(rows(limits, [dense], shapes=[(48, 32)], num_rows=[1, 3], steps=[(2, 1)]))
    names = [row.limit_name for row in found]
    assert names == ["bytes or operations", "F.linear", "oneDNN packed"] * 2 + ["bytes or operations", "F.linear"] * 2 + ["whole step"]
    assert all(row.value > 0 and row.limit for row in found)
