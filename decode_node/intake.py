"""Brings the prompt blocks of admitted sequences in: one pull each, receiver-driven, while prefill may still be computing.

A pull's task is its only owner. It ends when every rank has verified every block and the lease was released, or by failure or
cancel; in these cases its bound blocks stay quarantined until no read of it can land any more. Decides nothing about batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Cancelled, InternalError
from decode_node.reader import GroupReader
from decode_node.scheduler import Admitted, DecodeScheduler
from kv_transfer.client import PullClient
from kv_transfer.lease import Announced, FinalToken
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from ranks.session import Key, PullFacts

log = logging.getLogger(__name__)

# At most so much is asked of a rank at once: time limits are for reads of bounded size, however long the prompt that was announced.
READ_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class PullSource:
    """Where a sequence's blocks are: the lease, who announces them, and the ranks that hold them (empty: as told before)."""

    address: str
    incarnation: bytes
    lease: int
    exports: tuple[Export, ...]


@dataclass(slots=True)
class Progress:
    """One pull under way."""

    key: Key
    matched: int
    began_s: float
    transport: str = ""
    blocks: int = 0
    bytes_read: int = 0
    last_announced_s: float = 0.0
    final: FinalToken | None = None

    def facts(self) -> PullFacts:
        """The report of a pull that has just ended."""
        now = now_s()
        return PullFacts(
            key=self.key,
            blocks_pulled=self.blocks,
            blocks_matched=self.matched,
            bytes_pulled=self.bytes_read,
            seconds=now - self.began_s,
            exposed_s=now - self.last_announced_s,
            transport=self.transport,
        )


OnPulled = Callable[[Key, FinalToken, PullFacts], None]
OnFailed = Callable[[Key, BatonError], None]


class Intake:
    """All pulls of one group. State owner: the leader's event loop. block_bytes: of one block on one rank."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        client: PullClient,
        reader: GroupReader,
        on_pulled: OnPulled,
        on_failed: OnFailed,
        *,
        read_s: float,
        block_bytes: int,
    ) -> None:
        self.max_read_blocks = max(1, READ_BYTES // block_bytes)
        self._scheduler = scheduler
        self._client = client
        self._reader = reader
        self._read_s = read_s
        self._on_pulled = on_pulled
        self._on_failed = on_failed
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    @property
    def num_open(self) -> int:
        """Pulls under way."""
        return len(self._tasks)

    def begin(self, admitted: Admitted, source: PullSource, deadline: Deadline) -> None:
        """Start to pull what the sequence lacks."""
        key = (admitted.request_id, admitted.attempt)
        task = asyncio.create_task(self._run(Progress(key, admitted.matched_blocks, now_s()), source, deadline))
        self._tasks[key] = task
        task.add_done_callback(lambda task: self._ended(key, task))

    def cancel(self, key: Key) -> bool:
        """Stop a pull; False if there is none. Its blocks come back when its reads have ended."""
        task = self._tasks.get(key)
        return task is not None and task.cancel()

    def _ended(self, key: Key, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and task.exception():
            log.error("the end of the pull of %s failed", key, exc_info=task.exception())

    async def close(self) -> None:
        """Cancel all pulls and wait until their reads have ended (each has a deadline)."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, progress: Progress, source: PullSource, deadline: Deadline) -> None:
        try:
            final = await self._pull(progress, source, deadline)
            self._on_pulled(progress.key, final, progress.facts())
        except BatonError as error:
            self._on_failed(progress.key, error)
        except asyncio.CancelledError:
            self._on_failed(progress.key, Cancelled("the pull was cancelled", stage="pull"))
        except Exception as error:  # the edge of this task: a bug must end the sequence, not vanish
            log.exception("pull of %s failed", progress.key)
            self._on_failed(progress.key, InternalError(f"pull failed: {error!r}", stage="pull"))

    async def _pull(self, progress: Progress, source: PullSource, deadline: Deadline) -> FinalToken:
        progress.transport = await self._reader.learn(source.incarnation, source.exports)
        lease = (source.incarnation, source.lease)
        async with self._client.pull(source.address, *lease, progress.key[1], progress.matched, deadline) as pull:
            async for announced in pull:
                await self._take(progress, source.incarnation, announced, deadline)
            await pull.release()
        if progress.final is None:
            raise InternalError("the last announcement carried no token", stage="pull")
        return progress.final

    async def _take(self, progress: Progress, incarnation: bytes, announced: Announced, deadline: Deadline) -> None:
        progress.last_announced_s = now_s()
        progress.final = announced.final or progress.final
        for at in range(0, len(announced.block_ids), self.max_read_blocks):
            some = slice(at, at + self.max_read_blocks)
            await self._read(progress, incarnation, announced.block_ids[some], announced.generations[some], deadline)

    async def _read(
        self, progress: Progress, incarnation: bytes, block_ids: tuple[int, ...], generations: tuple[int, ...], deadline: Deadline
    ) -> None:
        bound = self._scheduler.bind(progress.key, len(block_ids))
        order = ReadOrder(incarnation, block_ids, generations, tuple(block for block, _ in bound))
        progress.bytes_read += await to_the_end(self._reader.read(order, deadline.sooner(self._read_s)))
        progress.blocks += len(bound)


async def to_the_end(reading: Awaitable[int]) -> int:
    """Bytes read. A cancel waits until the read has ended, so that no late byte lands in a block that is given back.

    The wait is bounded by the read's own deadline, and no further cancel (the node closes) cuts it short.
    """
    task = asyncio.ensure_future(reading)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and task.exception():
        log.debug("a cancelled pull's read failed as well: %s", task.exception())
    raise cancelled
