"""One rank of a decode node. The leader of a data-parallel group (its tp rank 0) has scheduler, block pool, pulls and the gRPC
service; a follower steps when its leader does and reads its own spans when told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from baton.deadline import Deadline
from baton.errors import BatonError, InvalidRequest
from decode_node.leader import DecodeLeader
from decode_node.reader import GroupReader, RankReader
from decode_node.service import SERVICES, add_services
from kv_transfer.reader import Reader
from kv_transfer.transport import Export
from ranks.drive import Drive
from ranks.facts import RankCounts, ReadOrder
from ranks.host import RankHost
from ranks.service import RANK_SERVICE, add_rank_service


class DecodeNode:
    """A loaded decode rank (see ranks.node.Role). State owner: the rank's event loop."""

    def __init__(self, host: RankHost) -> None:
        plan = host.plan
        self._host = host
        thread = host.start_transfers(lambda error: self.drive.fail(error))
        reader = Reader(
            thread,
            host.pool.data,
            host.layout,
            transport=plan.config.transfer.transport,
            earlier=host.layouts[: plan.rank],
        )
        host.on_close(reader.close)
        self._reader = RankReader(reader)
        add_rank_service(host.server, self)
        host.services.append(RANK_SERVICE)
        self._leader = DecodeLeader(host, GroupReader(self._reader, host.followers)) if plan.tp_rank == 0 else None
        self.drive: Drive = self._leader.drive if self._leader else Drive(host.step, host.wake_others, None)
        if self._leader:
            add_services(host.server, self._leader)
            host.services += SERVICES

    async def open(self) -> None:
        """See Role: nothing to find out."""

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

    def export(self) -> NoReturn:
        """Decode serves no reads."""
        raise InvalidRequest(f"{self._host.plan.node} is a decode node, it exports no blocks")

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Reach a prefill node's ranks."""
        return await self._reader.take_sources(incarnation, exports)

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Read this rank's spans."""
        return await self._reader.read(order, deadline)
