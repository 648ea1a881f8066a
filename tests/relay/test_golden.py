"""The whole relay gives transformers' tokens: Ray actors, gRPC, a real pull between processes, in several shapes.

One cluster per (model, shape); everything that can be asked of it is asked while it runs. Afterwards nothing is held.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.offline import Engine
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

BLOCK_SIZE = 16
CHUNK = 32
SHAPES = {
    "1-1": {"prefill.tp": 1, "decode.dp": 1},
    "tp2-dp2": {"prefill.tp": 2, "decode.dp": 2},
}
MORE_SHAPES = {
    "1-tp2": {"decode.tp": 2},
    "tp2-dp2tp2": {"prefill.tp": 2, "decode.dp": 2, "decode.tp": 2},
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
GREEDY = {"temperature": 0.0, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 1234, "max_tokens": 24, "ignore_eos": True}


@dataclass(frozen=True)
class Model:
    path: Path
    oracle: Oracle


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = make_tiny(request.param, tmp_path_factory.mktemp(request.param))
    yield Model(path, Oracle(path))


def prompt(length: int, seed: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(4, 300) for _ in range(length)]


def start(model: Model, layout: dict[str, int]) -> Engine:
    settings = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_memory": "32MiB", "max_model_len": 1024}
    return Engine(str(model.path), **settings, **layout, **{"prefill.max_step_tokens": CHUNK})


def check_greedy(engine: Engine, model: Model, prompts: list[list[int]], lengths: list[int]) -> None:
    asked = [{**GREEDY, "max_tokens": length, "logprobs": 0} for length in lengths]
    answers = engine.generate(prompts, asked)
    for ids, length, answer in zip(prompts, lengths, answers, strict=True):
        expected = model.oracle.greedy(ids, length)
        assert list(answer.token_ids) == expected.token_ids
        assert [item.logprob for item in answer.logprobs] == pytest.approx(expected.logprobs, abs=1e-4)
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == length


def check_shared_prefix(engine: Engine, model: Model) -> None:
    """The later prompts find the first one's blocks on prefill, and on decode once every group has held them."""
    shared = prompt(5 * BLOCK_SIZE, 1)
    tails = [prompt(3 + 9 * i, 20 + i) for i in range(4)]
    for tail in tails:
        check_greedy(engine, model, [shared + tail], [12])
    answer = engine.generate([shared + tails[0]], {**GREEDY, "max_tokens": 2})[0]
    assert answer.usage.cached_tokens >= 5 * BLOCK_SIZE
    assert sum(group["pulls"]["blocks_matched"] for group in engine.status()["groups"]) >= 5


def check_everything(engine: Engine, model: Model) -> list[list[int]]:
    check_greedy(engine, model, [prompt(1, 0), prompt(BLOCK_SIZE, 5), prompt(BLOCK_SIZE + 1, 6)], [1, 8, 20])
    check_shared_prefix(engine, model)
    check_greedy(engine, model, [prompt(10 * CHUNK + 5, 7)], [10])
    mixed = [(prompt(1 + 7 * i % 150, 100 + i), 1 + 5 * i % 33) for i in range(32)]
    check_greedy(engine, model, [ids for ids, _ in mixed], [length for _, length in mixed])
    return [list(answer.token_ids) for answer in engine.generate([prompt(40, 8), prompt(70, 9)], SEEDED)]


def test_relay_equals_transformers_in_every_shape(model: Model) -> None:
    seeded = {}
    for shape in SHAPES:
        with start(model, SHAPES[shape]) as engine:
            seeded[shape] = check_everything(engine, model)
            idle = engine.wait_idle()
            assert all(counts.idle() for counts in idle), idle
    assert seeded["1-1"] == seeded["tp2-dp2"], "sampling must not depend on the layout"


@pytest.mark.slow
@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_more_shapes(model: Model, shape: str) -> None:
    with start(model, MORE_SHAPES[shape]) as engine:
        check_everything(engine, model)
        assert all(counts.idle() for counts in engine.wait_idle())
