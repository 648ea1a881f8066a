"""Reads of blocks between simulated nodes: block by block, with time passing between, checked before and after as production does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded, LeaseLost, NodeLost, Unavailable
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from simulator.engine import Memory, SimSeat
from simulator.link import Link

CONNECT_S = 5.0
LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Source:
    """A prefill node's memory as one decode group sees it. shared: readable whatever its process does, as long as that lives."""

    memory: Memory
    link: Link
    shared: bool

    def trouble(self) -> BatonError | None:
        """Why nothing more can be read, if so."""
        return NodeLost("the source is gone", stage="pull") if self.link.far.dead else None

    @property
    def hangs(self) -> bool:
        """Whether bytes are awaited in vain for now."""
        return not self.shared and (self.link.silent or self.link.far.stopped)


Reaches = Callable[[bytes], "Source | None"]


class SimReader:
    """What decode's intake reads with. reaches: the memory of a prefill incarnation, if anybody ever had it.

    stuck_s: how long the next read hangs, deaf to its deadline, before it writes on.
    """

    def __init__(self, seat: SimSeat, reaches: Reaches) -> None:
        self.num_blocks_read = 0
        self.stuck_s = 0.0
        self._seat = seat
        self._reaches = reaches
        self._known: dict[bytes, Source] = {}

    async def learn(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Reach a prefill node; the transport. Raises BatonError."""
        if incarnation not in self._known:
            if not exports:
                raise Unavailable("this group does not know where the prefill node's blocks are; introduce it again", stage="pull")
            self._known[incarnation] = await self._reach(incarnation)
        return "shm" if self._known[incarnation].shared else "tcp"

    async def _reach(self, incarnation: bytes) -> Source:
        source = self._reaches(incarnation)
        if source is None:
            raise Unavailable("nobody exports these blocks", stage="pull")
        await self._wait(source, Deadline.after(CONNECT_S))
        return source

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Bytes read, once they are verified; ends only when nothing can land any more."""
        source = self._known.get(order.incarnation)
        if source is None:
            raise LeaseLost("the prefill node's incarnation is not connected", stage="pull", cause="incarnation")
        mine, theirs = self._seat.memory, source.memory
        owned = mine.owned(order.target_blocks)
        self._verify(source, order)
        stuck = await self._hang()
        for at, (block, target) in enumerate(zip(order.source_blocks, order.target_blocks, strict=True)):
            await asyncio.sleep(self._seat.read_s if stuck else min(self._seat.read_s, deadline.left_s()))
            await self._wait(source, deadline if not stuck else Deadline.after(1.0))
            mine.check_owned(owned[at : at + 1], f"a read of {self._seat.plan.node}")
            mine.blocks[target] = list(theirs.blocks[block])
            self.num_blocks_read += 1
        self._verify(source, order)
        return len(order.source_blocks) * self._seat.block_bytes

    async def _hang(self) -> bool:
        stuck_s, self.stuck_s = self.stuck_s, 0.0
        if stuck_s:
            await asyncio.sleep(stuck_s)
        return stuck_s > 0

    async def _wait(self, source: Source, deadline: Deadline) -> None:
        """Until bytes could have come."""
        while True:
            if deadline.passed():
                raise DeadlineExceeded("the blocks were not read in time", stage="pull")
            if trouble := source.trouble():
                raise trouble
            if not source.hangs:
                return
            await asyncio.sleep(min(LOOK_EVERY_S, deadline.left_s()))

    @staticmethod
    def _verify(source: Source, order: ReadOrder) -> None:
        if trouble := source.trouble():
            raise trouble
        for block, generation in zip(order.source_blocks, order.generations, strict=True):
            if source.memory.generations[block] != generation:
                raise LeaseLost(f"source block {block} holds other content than announced", stage="pull", cause="generation")
