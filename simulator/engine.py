"""A rank's process without tensors: steps that take virtual time, and blocks whose contents are Python numbers.

What a step or a read writes is checked when it is written: into blocks that its own pool holds for it, and that nobody was given
meanwhile. What is wrong in a block shows in the tokens, for these are drawn from the contents alone (see model.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from baton.config import RankPlan
from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool, BlockState
from baton.engine.runner import StepOutcome
from baton.errors import BatonError
from kv_transfer.layout import AXES, KVLayout
from kv_transfer.transport import NONCE_BYTES, Export
from ranks.facts import GroupHello, RankAddress
from simulator.model import ROOT, VOCAB_SIZE, logprob_of, next_token, slot_after

HEADS, DIM = 1, 1
WRITABLE = (BlockState.HELD, BlockState.QUARANTINED)


class Violation(AssertionError):
    """One of Baton's promises was broken."""


@dataclass(frozen=True, slots=True)
class Cost:
    """How long things take, seconds. step_s and token_s: a step and each of its tokens; block_s: reading one block."""

    step_s: float
    token_s: float
    block_s: float


Report = Callable[[Violation], None]


class Memory:
    """The KV blocks of one group, as its own steps and other nodes' reads see them; outlives its process, as shared memory does.

    blocks: what is in each slot; generations: of the content of each block, as peers can read them. pool: who owns what, according to
    the leader. report: whom a broken promise is told, since whoever writes may keep the exception to itself.
    """

    def __init__(self, incarnation: bytes, num_blocks: int, block_size: int, report: Report) -> None:
        self.incarnation = incarnation
        self.report = report
        self.block_size = block_size
        self.blocks = [[0] * block_size for _ in range(num_blocks)]
        self.generations = [0] * num_blocks
        self.pool: BlockPool | None = None

    def owned(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Note whose these blocks are: to be compared when they are written."""
        assert self.pool is not None, "a leader has a pool"
        return [(block, self.pool.generation(block)) for block in blocks]

    def check_owned(self, owned: Sequence[tuple[int, int]], writer: str) -> None:
        """Report and raise Violation if any of these blocks was given up, or given to somebody else, since they were noted."""
        assert self.pool is not None, "a leader has a pool"
        for block, generation in owned:
            state, now = self.pool.state(block), self.pool.generation(block)
            if state not in WRITABLE or now != generation:
                broken = Violation(f"{writer} writes block {block} in generation {generation}, which is {state.value} in {now}")
                self.report(broken)
                raise broken


class SimSeat:
    """ranks.seat.Seat in a simulated process. State owner: the process.

    slowness: how many times longer steps and reads take. failing: what the next step raises. tokenless: whether the next draw fails.
    num_alone: prompts computed by decode.
    """

    def __init__(self, plan: RankPlan, num_blocks: int, address: str, pid: int, cost: Cost, chance: random.Random, report: Report) -> None:
        self.plan = plan
        self.incarnation = chance.randbytes(16)
        self.num_blocks = num_blocks
        self.max_model_len = plan.config.max_model_len
        self.vocab_size = VOCAB_SIZE
        self.control_address = address
        self.memory = Memory(self.incarnation, num_blocks, plan.config.block_size, report)
        self.slowness = 1.0
        self.failing: BatonError | None = None
        self.tokenless = False
        self.num_steps = 0
        self.num_alone = 0
        self._pid = pid
        self._nonce = chance.randbytes(NONCE_BYTES)
        self._cost = cost
        self._layout = KVLayout(AXES, num_blocks, plan.config.block_size, 0, 1, (DIM, DIM), 0, HEADS, "float32", 1, HEADS)

    @property
    def block_bytes(self) -> int:
        """See Seat."""
        return self._layout.block_bytes

    @property
    def read_s(self) -> float:
        """Seconds that reading one block takes."""
        return self._cost.block_s * self.slowness

    def hello(self, transfer_address: str = "", exports: tuple[Export, ...] = ()) -> GroupHello:
        """See Seat."""
        address = RankAddress(self.plan.node, self.plan.rank, self._pid, "sim", self.control_address, 0)
        return GroupHello(
            node=self.plan.node,
            group=self.plan.group,
            incarnation=self.incarnation,
            model_fingerprint="numbers",
            dtype="float32",
            quantization="",
            max_model_len=self.max_model_len,
            layout=self._layout,
            ranks=(address,),
            transfer_address=transfer_address,
            exports=exports,
        )

    def export(self) -> Export:
        """Where the blocks can be read."""
        return Export(0, self._layout, "sim", "", self.control_address, self._nonce, self._layout.nbytes)

    async def wake_others(self, epoch: int) -> None:
        """See Seat: this rank steps alone."""

    async def step_begun(self) -> None:
        """See Seat: here nobody is in its way."""

    async def step(self, batch: Batch | None) -> StepOutcome:
        """See Seat."""
        assert batch is not None, "leaders bring a batch"
        self.num_steps += 1
        if not batch.num_tokens:
            return StepOutcome(self.num_steps, True, 0, _sampled([], [], 0))
        for block, generation in zip(batch.new_blocks.tolist(), batch.new_generations.tolist(), strict=True):
            self.memory.generations[block] = generation
        rows = _rows(batch, self.memory.block_size)
        self.num_alone += self.plan.role == "decode" and any(len(row.token_ids) > 1 for row in rows)
        owned = self.memory.owned([block for row in rows for block in row.table])
        await asyncio.sleep((self._cost.step_s + self._cost.token_s * batch.num_tokens) * self.slowness)
        if self.failing is not None:
            raise self.failing
        self.memory.check_owned(owned, f"a step of {self.plan.node}")
        for row in rows:
            self._write(row)
        return StepOutcome(self.num_steps, False, batch.num_tokens, self._drawn(batch, rows))

    def _write(self, row: _Row) -> None:
        blocks, size = self.memory.blocks, self.memory.block_size
        before = blocks[row.table[(row.start - 1) // size]][(row.start - 1) % size] if row.start else ROOT
        for position, token_id in enumerate(row.token_ids, row.start):
            before = blocks[row.table[position // size]][position % size] = slot_after(before, token_id)

    def _drawn(self, batch: Batch, rows: list[_Row]) -> Sampled:
        ends = {row.end: row for row in rows}
        banned, starts = batch.banned_ids.tolist(), batch.banned_starts.tolist()
        token_ids, logprobs = [], []
        for at, sampled in enumerate(batch.sample_rows.tolist()):
            slots = self._found(ends[sampled])
            token_id = next_token(
                slots,
                greedy=float(batch.temperatures[at]) == 0,
                seed=int(batch.seeds[at]),
                output_index=int(batch.output_indices[at]),
                banned_ids=banned[starts[at] : starts[at + 1]],
            )
            token_ids.append(token_id)
            logprobs.append(logprob_of(slots, token_id))
        sampled = _sampled(token_ids, logprobs, max(batch.num_logprobs.tolist(), default=0))
        return self._spoiled(sampled) if self.tokenless and token_ids else sampled

    def _spoiled(self, sampled: Sampled) -> Sampled:
        self.tokenless = False
        return replace(sampled, failed_rows=(0,))

    def _found(self, row: _Row) -> tuple[int, ...]:
        """Every slot of a row's context, as it lies in the blocks."""
        slots = [slot for block in row.table for slot in self.memory.blocks[block]]
        return tuple(slots[: row.start + len(row.token_ids)])


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence's part of a step. end: of its last token among all tokens of the step. table: the blocks of its context."""

    token_ids: list[int]
    start: int
    end: int
    table: list[int]


def _rows(batch: Batch, block_size: int) -> list[_Row]:
    token_ids, starts, lens = batch.token_ids.tolist(), batch.query_starts.tolist(), batch.context_lens.tolist()
    tables = batch.block_tables.tolist()
    return [
        _Row(token_ids[begin:end], context - (end - begin), end - 1, table[: -(-context // block_size)])
        for begin, end, context, table in zip(starts[:-1], starts[1:], lens, tables, strict=True)
    ]


def _sampled(token_ids: list[int], logprobs: list[float], num_top: int) -> Sampled:
    width = max(0, num_top)
    ids, values = np.array(token_ids, np.int64), np.array(logprobs, np.float32)
    return Sampled(ids, values, np.repeat(ids[:, None], width, 1), np.repeat(values[:, None], width, 1))
