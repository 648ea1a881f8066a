"""Latent attention on several ranks: what they compute, and that all of them hold the same latents."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.engine.checkpoint import SINGLE
from baton.engine.config_json import load_spec
from baton.engine.kv_shape import KVShape
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.errors import ConfigError
from tests.engine.driving import Job, asks, lead, make_runner, run_in_threads
from tests.engine.golden import assert_equal, expected
from tests.engine.teacher import Lesson, teach
from tests.tiny_models import make_tiny

Tiny = Callable[[str], Path]
LATENT = ("deepseek_v2", "deepseek_v2_grouped", "deepseek_v3")


@pytest.mark.relay
@pytest.mark.parametrize("arch", LATENT)
def test_four_ranks_equal_transformers(arch: str, tiny: Tiny) -> None:
    many = tuple(asks(6, (1, 9, 30), num_tokens=6))
    (got,) = run_in_threads(Job(tiny(arch), 4, 1, coupled=False, asks=(many,)))
    assert_equal(got, expected(tiny(arch), many))


@pytest.mark.relay
def test_experts_over_all_ranks_equal_transformers(tiny: Tiny) -> None:
    many, few = tuple(asks(7, (1, 9, 30))), tuple(asks(8, (5,), num_tokens=3))
    jobs = [Job(tiny(arch), 2, 2, coupled=True, asks=groups) for arch in LATENT for groups in ((many, few), ((), many))]
    for job, groups in zip(jobs, map(run_in_threads, jobs), strict=True):
        for wanted, got in zip(job.asks, groups, strict=True):
            assert_equal(got, expected(job.model_dir, wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_holds_the_same_latents(dtype: str, tiny: Tiny) -> None:
    """Bit for bit: a pull reads some of a sequence from one rank and some from another."""
    caches = teach(tiny("deepseek_v3"), Lesson(asks(9, (40,))[0].prompt, (33, 6, 1)), dtype, tp_size=4).caches
    assert len(set(caches)) == 1
    assert any(caches[0])


def test_what_is_cached_is_one_latent_per_token(tiny: Tiny) -> None:
    spec = load_spec(tiny("deepseek_v2"))
    shapes = [KVShape.of(spec, Placement.of(rank, 4), 16) for rank in range(4)]
    assert {(shape.head_start, shape.num_heads, shape.part_dims) for shape in shapes} == {(0, 1, (24 + 8,))}


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """As in the hub's DeepSeek-V3: they follow the last layer, embeddings and head among them."""
    model_dir = make_tiny("deepseek_v3", tmp_path)
    wanted = asks(10, (7,))
    want = expected(model_dir, wanted)
    extra(model_dir, "model.layers.3.embed_tokens.weight")
    assert_equal(lead(make_runner(model_dir, Placement(), Groups.alone()), wanted), want)
    extra(model_dir, "model.layers.4.embed_tokens.weight")
    with pytest.raises(ConfigError, match=r"does not ask for: model\.layers\.4\.embed_tokens"):
        make_runner(model_dir, Placement(), Groups.alone())


def extra(model_dir: Path, name: str) -> None:
    """Add a tensor to a checkpoint."""
    save_file({**load_file(model_dir / SINGLE), name: torch.ones(2, 2)}, model_dir / SINGLE)


def test_heads_that_do_not_divide_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=4 does not divide by 8 ranks"):
        make_runner(tiny("deepseek_v3"), Placement.of(0, 8), Groups.alone())
