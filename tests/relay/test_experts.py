"""What stepping together must not cost, in the real relay: prefill → decode dp=2 tp=2, experts over its four ranks.

A rank without work never holds up one that has some, a group without room never holds up admission on another, and when nobody has
work nobody burns CPU. Progress is counted in tokens and steps, never in seconds; waits only have a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from baton.client import Client
from cluster.offline import Engine
from ranks.facts import RankCounts
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

PATIENCE_S = 60.0
LOOK_EVERY_S = 0.05
BLOCK_SIZE = 16
PREFILL_BLOCKS = 256  # and twice as many on decode, whose ranks hold half of the heads each
BLOCK_BYTES = 3 * 2 * 2 * BLOCK_SIZE * 16 * 4  # of the tiny model in fp32: layers, parts, heads, slots, dim, bytes
MAX_LEN = PREFILL_BLOCKS * BLOCK_SIZE
GREEDY = {"temperature": 0.0, "ignore_eos": True}
SMALL = {**GREEDY, "max_tokens": 8}
HOG = {**GREEDY, "max_tokens": MAX_LEN - 4 * BLOCK_SIZE}  # a group has room for two, and for some small ones beside them


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny("qwen3_moe", tmp_path_factory.mktemp("moe"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": MAX_LEN}))
    return path


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    settings = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_memory": PREFILL_BLOCKS * BLOCK_BYTES, "max_model_len": MAX_LEN}
    settings["decode.max_prompt_tokens"] = 0
    shape = {"decode.dp": 2, "decode.tp": 2, "decode.reserve_output_tokens": MAX_LEN}
    with Engine(str(model), **settings, **shape) as engine:
        until(lambda: all(pair["usable"] for pair in engine.status()["pairs"]), "every pair is proven")
        yield engine


@pytest.fixture(autouse=True)
def nothing_stays(engine: Engine) -> Iterator[None]:
    yield
    counts = settled(engine)
    assert all(rank.idle() for rank in counts), counts


def until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, f"not in time: {what}"
        time.sleep(LOOK_EVERY_S)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(until, condition, what)


def prompt(length: int, seed: int) -> list[int]:
    return [10 + (seed * 37 + i * i * 7) % 400 for i in range(length)]


def decode_loads(engine: Engine) -> dict[str, dict[str, Any]]:
    """What the decode groups carry, as the router sees it."""
    return {group["name"]: group["load"] for group in engine.status()["groups"] if group["role"] == "decode"}


def num_sequences(load: dict[str, Any]) -> int:
    return int(load["waiting_sequences"] + load["running_sequences"])


def settled(engine: Engine) -> list[RankCounts]:
    """What ranks hold once nothing runs, all have fallen asleep, and the router knows it."""
    until(lambda: not any(map(num_sequences, decode_loads(engine).values())), "the router sees idle groups")
    until(lambda: all(rank.asleep and rank.idle() for rank in engine.counts()), "all ranks sleep")
    return engine.counts()


def of_decode(counts: list[RankCounts]) -> dict[int, RankCounts]:
    return {rank.rank: rank for rank in counts if rank.node == "decode-0"}


def test_an_idle_rank_takes_part_and_never_blocks_a_busy_one(engine: Engine, oracle: Oracle) -> None:
    before, rounds, length = of_decode(settled(engine)), 3, 40
    served = set()
    for number in range(rounds):  # one after the other: while both groups are empty, the same one is always chosen
        ids = prompt(20 + number, number)
        answer = engine.generate([ids], {**GREEDY, "max_tokens": length})[0]
        assert list(answer.token_ids) == oracle.greedy(ids, length).token_ids
        served |= {name for name in answer.served_by if name.startswith("decode")}
        settled(engine)
    assert len(served) == 1, "the other group was to be idle"
    after = of_decode(settled(engine))
    assert len(after) == 4
    steps = {after[rank].steps - before[rank].steps for rank in after}
    assert len(steps) == 1, "all ranks of the node step together"
    assert steps.pop() >= rounds * (length - 1)
    idle_leader = 2 if served == {"decode-0/0"} else 0
    assert after[idle_leader].cached == before[idle_leader].cached, "it never held a block"


@dataclass
class Asked:
    """A request whose tokens are counted as they come."""

    task: asyncio.Task[None] = field(init=False)
    token_ids: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, client: Client, ids: list[int], options: dict[str, Any]) -> Asked:
        asked = cls()
        asked.task = asyncio.create_task(asked._read(client, ids, options))
        return asked

    async def _read(self, client: Client, ids: list[int], options: dict[str, Any]) -> None:
        async with contextlib.aclosing(client.generate(ids, **options)) as chunks:
            async for chunk in chunks:
                self.token_ids += chunk.token_ids

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@contextlib.asynccontextmanager
async def client_of(engine: Engine) -> AsyncIterator[Client]:
    async with Client(engine.info.grpc) as client:
        yield client


async def fill_one_group(engine: Engine, client: Client) -> tuple[list[Asked], str, str]:
    """Ask for long answers until one group has to let one wait: all of them, that group, and the one where nobody waits."""
    hogs: list[Asked] = []
    loads: dict[str, dict[str, Any]] = {}
    while not any(load["waiting_sequences"] for load in loads.values()):
        hogs.append(Asked.start(client, prompt(30, len(hogs)), HOG))
        await eventually(lambda: sum(map(num_sequences, decode_loads(engine).values())) == len(hogs), "the hog has arrived")
        await eventually(lambda: bool(hogs[-1].token_ids), "its first token, which comes from prefill")
        loads = await asyncio.to_thread(decode_loads, engine)
        assert len(hogs) <= 6
    full, free = sorted(loads, key=lambda name: -loads[name]["waiting_sequences"])
    assert loads[free]["waiting_sequences"] == 0
    return hogs, full, free


async def test_a_full_group_does_not_stop_admission_on_the_other(engine: Engine, oracle: Oracle) -> None:
    async with client_of(engine) as client:
        hogs, full, free = await fill_one_group(engine, client)
        *running, blocked = hogs
        for number in range(4):
            ids = prompt(20, 50 + number)
            (answer,) = await client.complete(ids, **SMALL)
            assert list(answer.token_ids) == oracle.greedy(ids, SMALL["max_tokens"]).token_ids
            assert free in answer.served_by
            loads = await asyncio.to_thread(decode_loads, engine)
            assert loads[full]["waiting_sequences"] == 1, "it still finds no room"
        assert len(blocked.token_ids) == 1, "all small ones have finished before the one that waits has had a second token"
        assert not any(hog.task.done() for hog in hogs)
        for hog in running:
            await hog.stop()
        await eventually(lambda: len(blocked.token_ids) > 8, "room has come, the blocked one goes on")
        await blocked.stop()


def test_all_idle_uses_no_cpu(engine: Engine) -> None:
    before = {(rank.node, rank.rank): rank for rank in settled(engine)}
    time.sleep(3.0)
    burnt = {}
    for rank in engine.counts():
        earlier = before[rank.node, rank.rank]
        assert rank.asleep
        assert rank.steps == earlier.steps
        burnt[rank.node, rank.rank] = rank.cpu_seconds - earlier.cpu_seconds
    assert len(burnt) == 5
    assert max(burnt.values()) < 1.0, burnt  # beats of the streams take some hundredths; one busy wait would take 3 s
    print("CPU seconds in 3 idle seconds:", {f"{node}/{rank}": round(seconds, 3) for (node, rank), seconds in burnt.items()})
