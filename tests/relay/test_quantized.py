"""Quantized checkpoints through the running relay: fp8 gives transformers' tokens, int8 those of one rank alone.

One Ray, one cluster per checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from cluster.offline import Engine
from tests import quantized_checkpoints
from tests.engine.driving import Tokens, asks, lead, make_runner
from tests.engine.golden import assert_equal
from tests.relay.existing_ray import existing_ray
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

ASKS = asks(3, (1, 17, 40, 90), num_tokens=16)


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with existing_ray(4) as address:
        yield address


def answers(model: Path, ray_address: str, **settings: object) -> list[Tokens]:
    """What a cluster makes of ASKS, all at the same time: tokens with their logprobs. It leaves no block behind."""
    small = {
        "dtype": "float32",
        "kv_memory": "32MiB",
        "max_model_len": 512,
        "prefill.max_step_tokens": 32,
        "decode.max_prompt_tokens": 0,
        "ray.address": ray_address,
    }
    sampling = [{"temperature": 0.0, "ignore_eos": True, "max_tokens": ask.num_tokens, "logprobs": 0} for ask in ASKS]
    with Engine(str(model), **small, **settings) as engine:
        said = engine.generate([list(ask.prompt) for ask in ASKS], sampling)
        assert all(counts.idle() for counts in engine.wait_idle())
    return [[(item.token_id, item.logprob) for item in answer.logprobs] for answer in said]


def alone(model: Path, quantization: str) -> list[Tokens]:
    """The same from one rank in this process."""
    return lead(make_runner(model, Placement(), Groups.alone(), "float32", quantization), ASKS)


def test_fp8_equals_transformers_on_what_it_stands_for(tmp_path: Path, ray_address: str) -> None:
    plain = make_tiny("deepseek_v3", tmp_path / "plain")
    stored = quantized_checkpoints.fp8(plain, tmp_path / "fp8")
    oracle = Oracle(quantized_checkpoints.fp8_turned_back(plain, tmp_path / "turned_back"))
    said = answers(stored, ray_address, **{"prefill.tp": 2, "decode.dp": 2})
    assert [[token for token, _ in tokens] for tokens in said] == [oracle.greedy(ask.prompt, ask.num_tokens).token_ids for ask in ASKS]


@pytest.mark.parametrize("made", ["while loading", "before"])
def test_int8_says_what_one_rank_alone_says(made: str, tmp_path: Path, ray_address: str) -> None:
    """Sums in int32 are exact: neither chunks nor batches nor the pull change anything. One rank, since slices have scales of their own."""
    plain = make_tiny("qwen3", tmp_path / "plain")
    if made == "before":
        said = answers(quantized_checkpoints.compressed_tensors(plain, tmp_path / "int8"), ray_address)
    else:
        said = answers(plain, ray_address, quantization="w8a8")
    assert_equal(said, alone(plain, "w8a8"))
    apart = [
        abs(mine - theirs) for a, b in zip(said, alone(plain, "none"), strict=True) for (_, mine), (_, theirs) in zip(a, b, strict=True)
    ]
    assert max(apart) > 1e-2, "else this would not show that anything was quantized"
