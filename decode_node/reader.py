"""Reads of one decode group: every rank its own spans, the leader's here and the followers' over rank control."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence

from baton.deadline import Deadline
from baton.errors import LeaseLost, Unavailable
from kv_transfer.reader import Reader
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from ranks.service import Peer, Unacknowledged

log = logging.getLogger(__name__)

CONNECT_S = 5.0
MAX_SOURCES = 64


class RankReader:
    """One rank's own reads, for asyncio. The Reader belongs to the node.

    Prefill incarnations come and go while this rank lives: the MAX_SOURCES pulled from most recently stay connected.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._transports: OrderedDict[bytes, str] = OrderedDict()

    def knows(self, incarnation: bytes) -> str | None:
        """The transport to a prefill incarnation, if it is connected."""
        return self._transports.get(incarnation)

    def doubt(self, incarnation: bytes) -> None:
        """It may not be connected on every rank: reach it again before the next read."""
        self._transports.pop(incarnation, None)

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Reach a prefill node's ranks; the transport chosen. Raises Incompatible, Unavailable, DeadlineExceeded."""
        peer = await asyncio.to_thread(self._reader.connect, incarnation, exports, Deadline.after(CONNECT_S))
        self._transports[incarnation] = peer.transport
        while len(self._transports) > MAX_SOURCES:
            self._reader.forget(self._transports.popitem(last=False)[0])
        return peer.transport

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Bytes read, once they are verified. Ends only when no byte can land any more; see kv_transfer.transport.Ticket."""
        if order.incarnation in self._transports:
            self._transports.move_to_end(order.incarnation)
        ticket = self._reader.read(order.incarnation, order.source_blocks, order.generations, order.target_blocks, deadline)
        return await asyncio.wrap_future(ticket.future)


class GroupReader:
    """Has every rank of the group read (see intake.BlockReader). State owner: the leader's loop."""

    def __init__(self, own: RankReader, followers: Sequence[Peer]) -> None:
        self._own = own
        self._followers = followers
        self._reaching: dict[bytes, asyncio.Task[str]] = {}  # by incarnation, until connected or failed

    async def learn(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """See BlockReader. exports: empty if the router has told them before. Pulls that need the same node wait for one attempt."""
        known = self._own.knows(incarnation)
        if known is not None:
            return known
        task = self._reaching.get(incarnation)
        if task is None:
            task = self._reaching[incarnation] = asyncio.create_task(self._reach(incarnation, exports))
            task.add_done_callback(lambda task: self._reached(incarnation, task))
        return await asyncio.shield(task)

    def _reached(self, incarnation: bytes, task: asyncio.Task[str]) -> None:
        del self._reaching[incarnation]
        if not task.cancelled() and task.exception():  # also when every pull that waited for it was cancelled
            log.debug("a prefill node could not be reached: %s", task.exception())

    async def _reach(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        if not exports:
            raise Unavailable("this group does not know (any more) where the prefill node's blocks are; introduce it again", stage="pull")
        await asyncio.gather(*(follower.sources(incarnation, exports) for follower in self._followers))
        return await self._own.take_sources(incarnation, exports)

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """See BlockReader. A failure is raised only when every rank's read has ended, or has not said so in its time."""
        reads = [self._own.read(order, deadline), *(follower.read(order, deadline) for follower in self._followers)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise self._worst(order.incarnation, failures)
        return sum(result for result in results if isinstance(result, int))

    def _worst(self, incarnation: bytes, failures: Sequence[BaseException]) -> BaseException:
        """A rank that has said nothing counts for more than any that has said why it failed."""
        for failure in failures:
            if isinstance(failure, Unacknowledged):
                return failure
            if isinstance(failure, asyncio.CancelledError):  # the call's, not ours: its channel was closed
                return Unacknowledged("a rank's read was cut off", stage="pull")
            if isinstance(failure, LeaseLost) and failure.cause == "incarnation":
                self._own.doubt(incarnation)
        return failures[0]
