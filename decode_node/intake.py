"""Brings the prompt blocks of admitted sequences in: one pull each, receiver-driven, while prefill may still be computing.

A pull's task is its only owner and carries out its life (pull.py). Decides nothing about batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Cancelled, InternalError
from decode_node.outcome import Admitted
from decode_node.pull import Portion, PullEvent, PullLife, PullState, portions
from decode_node.scheduler import DecodeScheduler
from kv_transfer.client import Pull, PullClient
from kv_transfer.lease import Announced, FinalToken
from kv_transfer.tcp_frame import MAX_BLOCKS
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from ranks.service import Unacknowledged
from ranks.session import Key, PullFacts

log = logging.getLogger(__name__)

# At most so much is asked of a rank at once: time limits are for reads of bounded size, however long the prompt that was announced.
READ_BYTES = 256 * 2**20
# A read ends itself when its time is up; a rank may take so much longer to say so. Longer than the call to a follower waits.
ANSWER_S = 10.0


class BlockReader(Protocol):
    """Has every rank of the group read its own spans (see reader.GroupReader)."""

    async def learn(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Have every rank reach a prefill node; the transport used. Raises BatonError. Its waits have deadlines of their own."""

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Bytes read over all ranks, once all have verified them.

        Raises a BatonError when every rank has said that its read is over, so that nothing can land any more, and Unacknowledged
        if one has not.
        """


class PullListener(Protocol):
    """Who is told how pulls go: the leader. For every pull that was begun exactly one of these is called, once."""

    def pulled(self, key: Key, final: FinalToken, facts: PullFacts) -> None:
        """All blocks are here and verified on every rank."""

    def pull_failed(self, key: Key, error: BatonError) -> None:
        """The pull is over and nothing can land any more, whether or not the sequence had been given up before."""

    def pull_lost(self, key: Key, error: BatonError) -> None:
        """The pull is over, and bytes may land in its blocks for as long as some rank of the group lives: it must not."""


@dataclass(frozen=True, slots=True)
class PullSource:
    """Where a sequence's blocks are: the lease, who announces them, and the ranks that hold them (empty: as told before)."""

    address: str
    incarnation: bytes
    lease: int
    exports: tuple[Export, ...]


@dataclass(slots=True, eq=False)
class _UnderWay:
    """One pull's life, its facts so far, and its task, which ends it."""

    key: Key
    matched: int
    source: PullSource
    deadline: Deadline
    life: PullLife
    task: asyncio.Task[None] | None = None
    began_s: float = field(default_factory=now_s)
    transport: str = ""
    blocks: int = 0
    bytes_read: int = 0
    last_announced_s: float = 0.0

    def facts(self) -> PullFacts:
        """The report of a pull whose last block has just been verified."""
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


class Intake:
    """All pulls of one group. State owner: the leader's event loop. block_bytes: of one block on one rank. read_s: for one read."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        client: PullClient,
        reader: BlockReader,
        listener: PullListener,
        *,
        read_s: float,
        block_bytes: int,
        vocab_size: int,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.max_read_blocks = min(MAX_BLOCKS, max(1, READ_BYTES // block_bytes))
        self._scheduler = scheduler
        self._client = client
        self._reader = reader
        self._listener = listener
        self._read_s = read_s
        self._answer_s = answer_s
        self._vocab_size = vocab_size
        self._pulls: dict[Key, _UnderWay] = {}  # until the task has ended
        self._unanswered: list[asyncio.Future[int]] = []  # reads of lost pulls, until `close`

    @property
    def num_open(self) -> int:
        """Pulls under way."""
        return len(self._pulls)

    def begin(self, admitted: Admitted, source: PullSource, deadline: Deadline) -> None:
        """Start to pull what the sequence lacks."""
        request, matched = admitted.request, admitted.matched_blocks
        life = PullLife(request, matched, admitted.num_blocks, vocab_size=self._vocab_size, source=source.address)
        pull = self._pulls[request.key] = _UnderWay(request.key, matched, source, deadline, life)
        pull.task = asyncio.create_task(self._run(pull))
        pull.task.add_done_callback(lambda task: self._ended(pull, task))

    def cancel(self, key: Key) -> bool:
        """The sequence is given up. Whether its blocks may still be written: until `pull_failed`, which then comes, or for ever."""
        pull = self._pulls.get(key)
        if pull is None or pull.task is None:
            return False
        if pull.life.yields:
            return pull.task.cancel()
        return pull.life.state is PullState.LOST

    def _ended(self, pull: _UnderWay, task: asyncio.Task[None]) -> None:
        if self._pulls.get(pull.key) is pull:
            del self._pulls[pull.key]
        if task.cancelled():  # before it began
            self._cancelled(pull)
        elif task.exception():
            log.error("the end of the pull of %s failed", pull.key, exc_info=task.exception())

    async def close(self) -> None:
        """Cancel all pulls and wait until their reads have ended, or have not said so in their time."""
        tasks = [pull.task for pull in self._pulls.values() if pull.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reading in self._unanswered:
            reading.cancel()
        await asyncio.gather(*self._unanswered, return_exceptions=True)

    async def _run(self, pull: _UnderWay) -> None:
        """Exactly one word to the listener, whatever happens."""
        try:
            await self._pull(pull)
        except Unacknowledged as error:
            self._listener.pull_lost(pull.key, error)
        except BatonError as error:
            self._failed(pull, error)
        except asyncio.CancelledError:
            self._cancelled(pull)
        except Exception as error:  # the edge of this task: a bug must end the sequence, not vanish
            log.exception("pull of %s failed", pull.key)
            self._failed(pull, InternalError(f"pull failed: {error!r}", stage="pull"))

    def _failed(self, pull: _UnderWay, error: BatonError) -> None:
        if pull.life.state is PullState.RELEASING:  # the sequence runs; the lease ends by its own expiry, or has ended
            log.warning("the lease of %s was not released: %s", pull.key, error.message)
            pull.life.on(PullEvent.NOT_RELEASED)
            return
        pull.life.on(PullEvent.FAIL)
        self._listener.pull_failed(pull.key, error)

    def _cancelled(self, pull: _UnderWay) -> None:
        """Cancelled while no read is under way: wherever it awaits, or while it leaves the stream after one that ended badly."""
        life = pull.life
        if life.state is PullState.LOST:
            self._listener.pull_lost(pull.key, Unacknowledged("a read has not ended in its time", stage="pull"))
            return
        if life.state is PullState.READING:
            life.on(PullEvent.CANCEL)
        life.on(PullEvent.QUIESCED if life.state is PullState.DRAINING else PullEvent.CANCEL)
        if life.state is PullState.CANCELLED:
            self._listener.pull_failed(pull.key, Cancelled("the pull was cancelled", stage="pull"))

    async def _pull(self, pull: _UnderWay) -> None:
        source = pull.source
        pull.transport = await self._reader.learn(source.incarnation, source.exports)
        pull.life.on(PullEvent.REACHED)
        number, attempt = source.lease, pull.key[1]
        async with self._client.pull(source.address, source.incarnation, number, attempt, pull.matched, pull.deadline) as stream:
            pull.life.on(PullEvent.QUEUED)
            while pull.life.state is not PullState.RELEASING:
                await self._take(pull, stream, await anext(stream))
            await stream.release()
            pull.life.on(PullEvent.RELEASED)

    async def _take(self, pull: _UnderWay, stream: Pull, announced: Announced) -> None:
        pull.life.announced(announced)
        pull.last_announced_s = now_s()
        for portion in portions(announced, self.max_read_blocks):
            await self._read(pull, portion)
            stream.progress()
        final = pull.life.final
        if final is None:
            pull.life.on(PullEvent.VERIFIED)
            return
        self._listener.pulled(pull.key, final, pull.facts())  # it need not wait for the release
        pull.life.on(PullEvent.COMPLETE)

    async def _read(self, pull: _UnderWay, portion: Portion) -> None:
        bound = self._scheduler.bind(pull.key, len(portion.block_ids))
        order = ReadOrder(pull.source.incarnation, portion.block_ids, portion.generations, tuple(block for block, _ in bound))
        deadline = pull.deadline.sooner(self._read_s)
        reading = asyncio.ensure_future(self._reader.read(order, deadline))
        await self._end_of(reading, pull.life, Deadline(deadline.at_s + self._answer_s))
        pull.bytes_read += reading.result()
        pull.blocks += len(bound)

    async def _end_of(self, reading: asyncio.Future[int], life: PullLife, limit: Deadline) -> None:
        """Wait for it, however often this is cancelled, so that no late byte lands in a block that is given back.

        Raises Unacknowledged if it has no end, and CancelledError at its end, well or badly, if this was cancelled.
        """
        while not reading.done() and not limit.passed():
            try:
                await asyncio.wait([reading], timeout=limit.left_s())
            except asyncio.CancelledError:
                if life.state is PullState.READING:
                    life.on(PullEvent.CANCEL)
        if not reading.done() or reading.cancelled():
            self._unanswered.append(reading)
            life.on(PullEvent.UNACKNOWLEDGED)
            raise Unacknowledged("a read has not ended in its time", stage="pull")
        if isinstance(reading.exception(), Unacknowledged):
            life.on(PullEvent.UNACKNOWLEDGED)
        elif life.state is PullState.DRAINING:
            raise asyncio.CancelledError
