"""gRPC between the ranks of one node: wake, read, sources, export, ping. Knows the messages, decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Protocol, TypeVar, cast

import grpc

from baton.deadline import Deadline
from baton.errors import BatonError, InvalidRequest, NodeLost
from baton.rpc import ERROR_TRAILER, abort, open_channel, to_error
from baton.v1 import node_pb2, rank_pb2, rank_pb2_grpc
from baton.wire import time_left_from_message
from kv_transfer.client import export_of
from kv_transfer.server import export_message
from kv_transfer.transport import Export
from ranks.drive import Drive
from ranks.facts import ReadOrder

RANK_SERVICE = "baton.v1.RankControl"
WAKE_S = 5.0
EXPORT_S = 60.0
Answer = TypeVar("Answer")


class Unacknowledged(NodeLost):
    """A rank that was told to read has not said how that ended: bytes may land in its blocks for as long as its process lives."""


class RankSide(Protocol):
    """What a rank does when another rank of its node asks."""

    @property
    def drive(self) -> Drive:
        """What steps it."""

    def wake(self, epoch: int) -> None:
        """Join step `epoch`."""

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Remember where a prefill node's ranks can be read; the transport chosen. Raises Incompatible."""

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Read this rank's spans of some blocks; bytes read. Raises BatonError."""

    def export(self) -> Export:
        """Where this rank's blocks can be read. Raises InvalidRequest on a rank that serves no reads."""


class RankService(rank_pb2_grpc.RankControlServicer):
    """The RankControl service over one rank."""

    def __init__(self, side: RankSide) -> None:
        self._side = side

    async def Wake(self, request: rank_pb2.WakeRequest, context: grpc.aio.ServicerContext) -> rank_pb2.WakeReply:  # type: ignore[type-arg]
        """See proto."""
        self._side.wake(request.epoch)
        return rank_pb2.WakeReply()

    async def Sources(self, request: rank_pb2.SourcesRequest, context: grpc.aio.ServicerContext) -> rank_pb2.SourcesReply:  # type: ignore[type-arg]
        """See proto."""
        try:
            exports = [export_of(handle) for handle in request.exports]
            return rank_pb2.SourcesReply(transport=await self._side.take_sources(request.prefill_incarnation, exports))
        except BatonError as error:
            await abort(context, error)

    async def Read(self, request: rank_pb2.ReadRequest, context: grpc.aio.ServicerContext) -> rank_pb2.ReadReply:  # type: ignore[type-arg]
        """See proto."""
        try:
            deadline = Deadline.after(time_left_from_message(request.time_left_s))
            return rank_pb2.ReadReply(bytes_read=await self._side.read(_order(request), deadline))
        except BatonError as error:
            await abort(context, error)

    async def Ping(self, request: rank_pb2.PingRequest, context: grpc.aio.ServicerContext) -> rank_pb2.PingReply:  # type: ignore[type-arg]
        """See proto."""
        return rank_pb2.PingReply(steps=self._side.drive.steps)

    async def Export(self, request: rank_pb2.ExportRequest, context: grpc.aio.ServicerContext) -> node_pb2.ExportHandle:  # type: ignore[type-arg]
        """See proto."""
        try:
            return export_message(self._side.export())
        except BatonError as error:
            await abort(context, error)


def _order(request: rank_pb2.ReadRequest) -> ReadOrder:
    lengths = {len(request.source_blocks), len(request.generations), len(request.target_blocks)}
    if len(lengths) != 1:
        raise InvalidRequest(
            f"a read names {sorted(lengths)} source blocks, generations and target blocks; they must be as many", stage="pull"
        )
    return ReadOrder(
        incarnation=request.lease.prefill_incarnation,
        source_blocks=tuple(request.source_blocks),
        generations=tuple(request.generations),
        target_blocks=tuple(request.target_blocks),
    )


def add_rank_service(server: grpc.aio.Server, side: RankSide) -> None:
    """Have `server` answer the node's other ranks."""
    rank_pb2_grpc.add_RankControlServicer_to_server(RankService(side), server)


class Peer:
    """Another rank of the same node, as seen from here. Owns its channel; closed with the rank. stage: what errors say it is part of."""

    def __init__(self, node: str, rank: int, address: str, stage: str = "") -> None:
        self._stage = stage
        self.name = f"{node}/{rank}"
        self.rank = rank
        self._channel = open_channel(address)
        self._stub = rank_pb2_grpc.RankControlStub(self._channel)

    async def wake(self, epoch: int) -> None:
        """Have the rank join step `epoch`. Raises NodeLost or DeadlineExceeded if it does not answer."""
        await self._call(self._stub.Wake(rank_pb2.WakeRequest(epoch=epoch), timeout=WAKE_S))

    async def sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        """Tell the rank where a prefill node can be read; the transport it chose."""
        handles = [export_message(export) for export in exports]
        request = rank_pb2.SourcesRequest(prefill_incarnation=incarnation, exports=handles)
        return str((await self._call(self._stub.Sources(request, timeout=WAKE_S))).transport)

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        """Have the rank read its spans; bytes read. The rank has its own deadline, a little sooner than this call's.

        Raises what the rank says, or Unacknowledged if it says nothing: no answer in time, a broken connection.
        """
        request = rank_pb2.ReadRequest(
            lease=node_pb2.LeaseId(prefill_incarnation=order.incarnation),
            source_blocks=order.source_blocks,
            generations=order.generations,
            target_blocks=order.target_blocks,
            time_left_s=deadline.left_s(),
        )
        try:
            return int((await self._stub.Read(request, timeout=deadline.left_s() + WAKE_S)).bytes_read)
        except grpc.aio.AioRpcError as error:
            if ERROR_TRAILER in dict(cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())):
                raise to_error(error, stage="pull", node=self.name) from error
            raise Unacknowledged(f"{self.name} has not said how its read ended: {error.details()}", stage="pull", node=self.name) from error

    async def export(self) -> Export:
        """Where the rank's blocks can be read; waits, up to EXPORT_S, for a rank that is just starting."""
        call = self._stub.Export(rank_pb2.ExportRequest(), timeout=EXPORT_S, wait_for_ready=True)
        return export_of(await self._call(call))

    async def ping(self, timeout_s: float) -> int:
        """The steps that the rank has done. Raises NodeLost or DeadlineExceeded if it does not answer in time."""
        return int((await self._call(self._stub.Ping(rank_pb2.PingRequest(), timeout=timeout_s))).steps)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)

    async def _call(self, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise to_error(error, stage=self._stage, node=self.name) from error


async def wake_all(peers: Sequence[Peer], epoch: int) -> None:
    """Wake every peer at once; the first failure is raised after all have been tried."""
    results = await asyncio.gather(*(peer.wake(epoch) for peer in peers), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
