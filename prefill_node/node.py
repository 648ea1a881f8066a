"""One rank of a prefill node. The leader (rank 0) has scheduler, block pool, leases and gRPC services; a follower steps when its
leader does. Every rank exports its own KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from baton.deadline import Deadline
from baton.errors import BatonError, InvalidRequest
from kv_transfer.source import SourceRank
from kv_transfer.transport import Export
from prefill_node.leader import PrefillLeader
from prefill_node.service import SERVICES, add_services
from ranks.drive import Drive
from ranks.facts import RankCounts, ReadOrder
from ranks.host import RankHost
from ranks.service import RANK_SERVICE, add_rank_service


class PrefillNode:
    """A loaded prefill rank (see ranks.node.Role). State owner: the rank's event loop."""

    def __init__(self, host: RankHost) -> None:
        config = host.plan.config.transfer
        self._host = host
        thread = host.start_transfers(lambda error: self.drive.fail(error))
        self._source = SourceRank(
            thread,
            host.pool,
            host.layout,
            rank=host.plan.tp_rank,
            host=host.plan.host,
            shm=config.transport != "tcp",
            tcp=config.transport != "shm",
        )
        host.on_close(self._source.close)
        add_rank_service(host.server, self)
        host.services.append(RANK_SERVICE)
        self._leader = PrefillLeader(host) if host.plan.tp_rank == 0 else None
        self.drive: Drive = self._leader.drive if self._leader else Drive(host.step, host.wake_others, None)
        if self._leader:
            add_services(host.server, self._leader)
            host.services += SERVICES

    async def open(self) -> None:
        """See Role: the leader learns where its followers' blocks are."""
        if self._leader:
            self._leader.exports = (self._source.export, *[await peer.export() for peer in self._host.followers])

    def counts(self) -> RankCounts:
        """See Role."""
        steps, asleep = self.drive.steps, self.drive.asleep
        if self._leader is None:
            return self._host.counts(steps, asleep)
        return self._host.counts(steps, asleep, self._leader.load(), len(self._leader.desk))

    async def close(self, error: BatonError | None) -> None:
        """See Role."""
        if self._leader:
            await self._leader.close(error)

    # What other ranks ask (see ranks.service.RankSide).

    def wake(self, epoch: int) -> None:
        """Join step `epoch`."""
        self.drive.wake(epoch)

    def export(self) -> Export:
        """Where this rank's blocks can be read."""
        return self._source.export

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> NoReturn:
        """Prefill reads from nobody."""
        raise InvalidRequest(f"{self._host.plan.node} is a prefill node, it reads no blocks")

    async def read(self, order: ReadOrder, deadline: Deadline) -> NoReturn:
        """Prefill reads from nobody."""
        raise InvalidRequest(f"{self._host.plan.node} is a prefill node, it reads no blocks")
