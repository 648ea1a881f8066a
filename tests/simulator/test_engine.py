"""Steps and reads compute from the contents of blocks alone, and whoever writes what is not theirs is found."""

import asyncio
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import BatonConfig, RankPlan
from baton.deadline import Deadline
from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.blocks import BlockPool
from baton.errors import DeadlineExceeded, LeaseLost, NodeLost
from baton.request import Sampling
from ranks.facts import ReadOrder
from simulator.engine import Cost, SimSeat, Violation
from simulator.link import Weather
from simulator.loop import VirtualLoop
from simulator.model import answer
from simulator.network import Network
from simulator.reading import SimReader, Source

BLOCK_SIZE, NUM_BLOCKS = 4, 24
PLAN = RankPlan(config=BatonConfig(model="m", block_size=BLOCK_SIZE, max_model_len=64), role="prefill", node="p", rank=0, threads=1)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def seat_on(loop: VirtualLoop, seed: int = 1) -> SimSeat:
    seat = SimSeat(PLAN, NUM_BLOCKS, "p:1", 7, Cost(0.01, 0.001, 0.1), random.Random(seed), loop.failures.append)
    seat.memory.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    return seat


def sampled(index: int) -> SampleRow:
    return SampleRow(seed=9, output_index=index, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


async def generate(seat: SimSeat, prompt: list[int], chunks: list[int], num_tokens: int) -> list[int]:
    """The prompt in chunks, then token by token."""
    taken = seat.memory.pool.take(-(-(len(prompt) + num_tokens) // BLOCK_SIZE), reserved=False)
    blocks, at = [block for block, _ in taken], 0
    token_ids: list[int] = []
    for count in chunks:
        last = at + count >= len(prompt)
        row = Row(prompt[at : at + count], at, blocks, sampled(0) if last else None)
        outcome = await seat.step(Batch.build([row], taken if not at else ()))
        at += count
    token_ids.append(int(outcome.sampled.token_ids[0]))
    while len(token_ids) < num_tokens:
        row = Row(token_ids[-1:], len(prompt) + len(token_ids) - 1, blocks, sampled(len(token_ids)))
        token_ids.append(int((await seat.step(Batch.build([row]))).sampled.token_ids[0]))
    return token_ids


@given(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.integers(1, 12), st.data())
def test_any_chunks_give_the_undisturbed_answer(prompt, num_tokens, data):
    chunks = []
    while sum(chunks) < len(prompt):
        chunks.append(data.draw(st.integers(1, len(prompt) - sum(chunks))))
    loop = VirtualLoop()
    made = loop.run(generate(seat_on(loop), prompt, chunks, num_tokens))
    loop.close()
    assert tuple(made) == answer(prompt, Sampling(max_tokens=num_tokens, seed=9)).token_ids


@pytest.mark.parametrize("block", range(5))
def test_one_wrong_block_shows_in_the_tokens(loop, block):
    prompt = list(range(40, 60))

    async def work():
        seat = seat_on(loop)
        await generate(seat, prompt, [20], 1)
        seat.memory.blocks[block][block % BLOCK_SIZE] += 1
        row = Row([prompt[-1]], 19, range(5), sampled(0))
        return int((await seat.step(Batch.build([row]))).sampled.token_ids[0])

    drawn = loop.run(work())
    assert (drawn,) != answer(prompt, Sampling(max_tokens=1, seed=9)).token_ids


@pytest.mark.parametrize("given_away", [False, True])
def test_a_step_that_writes_what_it_lost_is_found(loop, given_away):
    async def work():
        seat = seat_on(loop)
        pool = seat.memory.pool
        taken = pool.take(2, reserved=False)
        blocks = [block for block, _ in taken]
        step = asyncio.create_task(seat.step(Batch.build([Row([1, 2, 3, 4, 5], 0, blocks, sampled(0))], taken)))
        await asyncio.sleep(0.001)
        pool.release(blocks)
        if given_away:
            pool.take(2, reserved=False)
        await step

    with pytest.raises(Violation, match="a step of p writes block 0"):
        loop.run(work())
    assert len(loop.failures) == 1


class Pair:
    """A prefill seat with six filled blocks, and a decode seat that may read them."""

    def __init__(self, loop: VirtualLoop, shared: bool) -> None:
        self.loop = loop
        self.network = Network(loop, Weather(), random.Random(3))
        self.near, self.far = loop.process("decode", 5), loop.process("prefill", 9)
        self.theirs, self.mine = seat_on(loop, 1), seat_on(loop, 2)
        self.link = self.network.link(self.near, self.far)
        source = Source(self.theirs.memory, self.link, shared)
        self.reader = SimReader(self.mine, lambda incarnation: source if incarnation == self.theirs.incarnation else None)
        self.targets = [block for block, _ in self.mine.memory.pool.take(6, reserved=False)]
        for block in range(6):
            self.theirs.memory.blocks[block] = [block * 10 + slot for slot in range(BLOCK_SIZE)]
            self.theirs.memory.generations[block] = 1

    async def read(self, within_s: float = 2.0) -> int:
        await self.reader.learn(self.theirs.incarnation, [self.theirs.export()])
        order = ReadOrder(self.theirs.incarnation, tuple(range(6)), (1,) * 6, tuple(self.targets))
        return await self.reader.read(order, Deadline.after(within_s))


def test_a_read_copies_all_blocks(loop):
    pair = Pair(loop, shared=False)
    assert loop.run(pair.read()) == 6 * pair.mine.block_bytes
    assert [pair.mine.memory.blocks[block] for block in pair.targets] == pair.theirs.memory.blocks[:6]


def test_a_block_that_is_written_meanwhile_fails_the_read(loop):
    pair = Pair(loop, shared=True)

    async def work():
        reading = asyncio.create_task(pair.read())
        await asyncio.sleep(0.25)
        pair.theirs.memory.generations[5] = 2
        await reading

    with pytest.raises(LeaseLost, match="block 5"):
        loop.run(work())


@pytest.mark.parametrize(("shared", "fails"), [(True, None), (False, DeadlineExceeded)])
def test_a_stopped_source_is_read_only_where_memory_is_shared(loop, shared, fails):
    pair = Pair(loop, shared)

    async def work():
        reading = asyncio.create_task(pair.read())
        await asyncio.sleep(0.25)
        pair.network.stop(pair.far)
        return await reading

    if fails is None:
        assert loop.run(work()) > 0
    else:
        with pytest.raises(fails):
            loop.run(work())


@pytest.mark.parametrize("shared", [True, False])
def test_a_dead_source_is_noticed(loop, shared):
    pair = Pair(loop, shared)

    async def work():
        reading = asyncio.create_task(pair.read())
        await asyncio.sleep(0.25)
        pair.network.kill(pair.far)
        await reading

    with pytest.raises(NodeLost):
        loop.run(work())


def test_a_read_into_blocks_that_were_given_up_is_found(loop):
    pair = Pair(loop, shared=True)

    async def work():
        reading = asyncio.create_task(pair.read())
        await asyncio.sleep(0.25)
        pair.mine.memory.pool.release(pair.targets)
        await reading

    with pytest.raises(Violation, match="a read of p writes block"):
        loop.run(work())


def test_a_stuck_read_writes_after_its_deadline(loop):
    pair = Pair(loop, shared=True)
    pair.reader.stuck_s = 30.0

    async def work():
        await pair.read(within_s=1.0)
        return loop.now_s

    assert loop.run(work()) > 30
