"""Reads of one decode group: every rank its own spans, the leader's here and the followers' over rank control."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.deadline import Deadline
from kv_transfer.reader import Reader
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from ranks.service import Peer

CONNECT_S = 5.0


class RankReader:
    """One rank's own reads, for asyncio. Owner of nothing: the Reader belongs to the node."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._transports: dict[bytes, str] = {}

    def knows(self, incarnation: bytes) -> str | None:
        """The transport to a prefill incarnation, if it has been connected."""
        return self._transports.get(incarnation)

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Reach a prefill node's ranks; the transport chosen. Raises Incompatible, Unavailable, DeadlineExceeded."""
        peer = await asyncio.to_thread(self._reader.connect, incarnation, exports, Deadline.after(CONNECT_S))
        self._transports[incarnation] = peer.transport
        return peer.transport

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Bytes read, once they are verified. Ends only when no byte can land any more; see kv_transfer.transport.Ticket."""
        ticket = self._reader.read(order.incarnation, order.source_blocks, order.generations, order.target_blocks, deadline)
        return await asyncio.wrap_future(ticket.future)


class GroupReader:
    """Has every rank of the group read. State owner: the leader's loop."""

    def __init__(self, own: RankReader, followers: Sequence[Peer]) -> None:
        self._own = own
        self._followers = followers
        self._exports: dict[bytes, Sequence[Export]] = {}  # of every prefill incarnation this group has pulled from

    async def learn(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Have every rank reach a prefill node, once per incarnation; the transport the leader uses. Raises BatonError.

        exports: empty if a router told them before.
        """
        known = self._own.knows(incarnation)
        if known is not None:
            return known
        exports = exports or self._exports.get(incarnation, ())
        self._exports[incarnation] = exports
        await asyncio.gather(*(follower.sources(incarnation, exports) for follower in self._followers))
        return await self._own.take_sources(incarnation, exports)

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Bytes read over all ranks, once all have verified. A failure is raised only when every rank's read has ended."""
        reads = [self._own.read(order, deadline), *(follower.read(order, deadline) for follower in self._followers)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        total = 0
        for result in results:
            if isinstance(result, BaseException):
                raise result
            total += result
        return total
