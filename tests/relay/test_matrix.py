"""The golden matrix: every model in every layout and every state of the prefix caches gives transformers' tokens, through real processes.

One cluster per model and shape; everything that can be asked of it is asked while it runs, and afterwards nothing is held. In
which state the caches are is proven by figures: what prefill found (usage) and what decode found (pull reports). `make test` runs
cells that show every pair of (architecture, prefill shape, decode shape), `make test-full` the others as well.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton.client import Answer, Options
from cluster.offline import Engine
from tests.relay.existing_ray import existing_ray
from tests.relay.matrix import EXTRA, MAX_RANKS, MORE_EXTRA, Cell, cells, covering
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

BLOCK_SIZE = 16
CHUNK = 32
PREFIX_BLOCKS = 5
MAX_ROUNDS = 5
GREEDY: Options = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
SEEDED: Options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 1234, "max_tokens": 24, "ignore_eos": True}

WHOLE = tuple(cells())
CHOSEN = {*covering(WHOLE), *EXTRA}


@dataclass(frozen=True)
class Model:
    path: Path
    oracle: Oracle


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with existing_ray(MAX_RANKS) as address:
        yield address


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Models by architecture; each is made once, and what its oracle said is remembered for the next shape."""
    made: dict[str, Model] = {}

    def get(arch: str) -> Model:
        if arch not in made:
            path = make_tiny(arch, tmp_path_factory.mktemp(arch))
            made[arch] = Model(path, Oracle(path))
        return made[arch]

    return get


def draw(length: int, seed: int) -> list[int]:
    """A prompt that no other seed begins with."""
    drawn = random.Random(seed)
    return [drawn.randrange(4, 300) for _ in range(length)]


class Running:
    """A cluster under test with the model that says what is right."""

    def __init__(self, engine: Engine, model: Model, cell: Cell) -> None:
        self.engine = engine
        self.cell = cell
        self._oracle = model.oracle

    def check(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """All prompts at the same time, greedy: tokens, log-probabilities and usage are right."""
        answers = self.engine.generate(prompts, [{**GREEDY, "max_tokens": length} for length in lengths])
        for ids, length, answer in zip(prompts, lengths, answers, strict=True):
            expected = self._oracle.follows(ids, answer.token_ids)
            assert len(answer.token_ids) == length
            assert list(answer.token_ids) == expected.token_ids
            assert [item.logprob for item in answer.logprobs] == pytest.approx(expected.logprobs, abs=1e-4)
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), length)
        return answers

    def check_seeded(self, prompts: list[list[int]]) -> None:
        """What is drawn depends on seed and distribution alone: not on layout, batch or where it is drawn."""
        for ids, answer in zip(prompts, self.engine.generate(prompts, SEEDED), strict=True):
            assert list(answer.token_ids) == self._oracle.draws(ids, answer.token_ids, SEEDED)
            assert len(answer.token_ids) == SEEDED["max_tokens"]

    def check_found(self, prefixes: list[list[int]], tail_seed: int, *, on_prefill: int, on_decode: int) -> None:
        """A prompt with each prefix, at the same time: right, and exactly so many of each one's blocks were found on either side."""
        prompts = [prefix + draw(3 + 14 * i, tail_seed + i) for i, prefix in enumerate(prefixes)]
        before = self._found_on_decode()
        answers = self.check(prompts, [12] * len(prompts))
        assert [answer.usage.cached_tokens for answer in answers] == [on_prefill * BLOCK_SIZE] * len(prompts)
        served = Counter(group_of(answer) for answer in answers)
        assert self._found_on_decode() - before == Counter({name: on_decode * count for name, count in served.items() if on_decode})

    def warm_prefill(self, prefixes: list[list[int]]) -> None:
        """Prefill alone has seen the prefixes: a request of one token never reaches decode."""
        pulls = self._pulls()
        answers = self.check([prefix + draw(2, 99) for prefix in prefixes], [1] * len(prefixes))
        assert {answer.served_by for answer in answers} == {("prefill-0",)}
        assert self._pulls() == pulls

    def warm_decode(self, prefixes: list[list[int]]) -> None:
        """Every decode group has seen every prefix, and prefill has forgotten them."""
        for prefix in prefixes:
            self._on_all_groups(prefix)
        assert all(rank.idle() for rank in self.engine.wait_idle())
        assert self.engine.flush_cache("prefill-0") >= PREFIX_BLOCKS * len(prefixes)

    def _on_all_groups(self, prefix: list[int]) -> None:
        seen: set[str] = set()
        for attempt in range(MAX_ROUNDS):  # the router spreads what comes at the same time; one round is mostly enough
            tails = [draw(5, 200 + attempt * self.cell.num_groups + i) for i in range(self.cell.num_groups)]
            seen |= {group_of(answer) for answer in self.check([prefix + tail for tail in tails], [12] * len(tails))}
            if len(seen) == self.cell.num_groups:
                return
        raise AssertionError(f"only {seen} were used in {MAX_ROUNDS} rounds")

    def _found_on_decode(self) -> Counter[str]:
        return Counter({group["name"]: group["pulls"]["blocks_matched"] for group in self._decode_status()})

    def _pulls(self) -> int:
        return sum(group["pulls"]["pulls"] for group in self._decode_status())

    def _decode_status(self) -> list[dict[str, Any]]:
        return [group for group in self.engine.status()["groups"] if group["role"] == "decode"]


def group_of(answer: Answer) -> str:
    """The decode group that made an answer."""
    (name,) = (name for name in answer.served_by if name.startswith("decode"))
    return name


def check_cache_states(running: Running) -> None:
    """As many prefixes as decode groups, so that prompts that come at the same time do not find each other's blocks."""
    cold, prefill_only, decode_only = (
        [draw(PREFIX_BLOCKS * BLOCK_SIZE, seed + i) for i in range(running.cell.num_groups)] for seed in (1, 3, 5)
    )
    running.check_found(cold, 10, on_prefill=0, on_decode=0)
    running.warm_prefill(prefill_only)
    running.check_found(prefill_only, 20, on_prefill=PREFIX_BLOCKS, on_decode=0)
    running.warm_decode(decode_only)
    running.check_found(decode_only, 30, on_prefill=0, on_decode=PREFIX_BLOCKS)
    running.check_found(decode_only, 40, on_prefill=PREFIX_BLOCKS, on_decode=PREFIX_BLOCKS)


def check_lengths(running: Running) -> None:
    running.check([draw(1, 50), draw(BLOCK_SIZE, 51), draw(BLOCK_SIZE + 1, 52)], [1, 8, 20])
    running.check([draw(10 * CHUNK + 5, 53)], [10])
    mixed = [(draw(1 + 7 * i % 150, 100 + i), 1 + 5 * i % 33) for i in range(32)]
    running.check([prompt for prompt, _ in mixed], [length for _, length in mixed])


def marked(cell: Cell) -> object:
    return pytest.param(cell, id=str(cell), marks=() if cell in CHOSEN else pytest.mark.slow)


@pytest.mark.parametrize("cell", [marked(cell) for cell in (*WHOLE, *EXTRA, *MORE_EXTRA)])
def test_every_layout_equals_transformers(cell: Cell, model_of: Callable[[str], Model], ray_address: str) -> None:
    model = model_of(cell.arch)
    settings = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "kv_memory": "32MiB",
        "max_model_len": 1024,
        "prefill.max_step_tokens": CHUNK,
        "decode.max_prompt_tokens": 0,
    }
    with Engine(str(model.path), {**settings, **cell.layout, "ray.address": ray_address}) as engine:
        running = Running(engine, model, cell)
        check_cache_states(running)
        check_lengths(running)
        running.check_seeded([draw(40, 60), draw(70, 61)])
        idle = engine.wait_idle()
        assert all(counts.idle() for counts in idle), idle
        assert engine.flush_cache() == sum(counts.cached for counts in idle)
        assert all(counts.free == counts.total for counts in engine.counts())
