"""The gRPC face of a decode group's leader: control commands in, events out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from baton import wire
from baton.errors import BatonError
from baton.v1 import node_pb2, node_pb2_grpc
from decode_node.intake import PullSource
from decode_node.leader import DecodeLeader
from kv_transfer.client import export_of
from ranks.control import serve_control
from ranks.session import Session

SERVICES = ("baton.v1.DecodeNode",)


def add_services(server: grpc.aio.Server, leader: DecodeLeader) -> None:
    """Have `server` answer routers."""
    node_pb2_grpc.add_DecodeNodeServicer_to_server(DecodeService(leader), server)


class DecodeService(node_pb2_grpc.DecodeNodeServicer):
    """baton.v1.DecodeNode over one group's leader."""

    def __init__(self, leader: DecodeLeader) -> None:
        self._leader = leader

    async def Control(
        self,
        request_iterator: AsyncIterator[node_pb2.DecodeCommand],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        """See proto."""
        await serve_control(request_iterator, context, self._leader, self._take)

    def _take(self, session: Session, command: node_pb2.DecodeCommand) -> None:
        match command.WhichOneof("command"):
            case "decode":
                self._decode(session, command.decode)
            case "cancel":
                self._leader.desk.cancel(session, command.cancel.request_id, command.cancel.attempt, command.cancel.reason)
            case "check":
                self._leader.desk.check(session, command.check.request_id, command.check.attempt)
            case "flush":
                session.flushed(command.flush.number, self._leader.pool.drop_cache())

    def _decode(self, session: Session, message: node_pb2.DecodeRequest) -> None:
        sequence = message.sequence
        try:
            request = wire.sequence_from_message(sequence)
            source = _source(message)
        except BatonError as error:
            self._leader.desk.refuse(session, (sequence.request_id, sequence.attempt), error)
            return
        self._leader.decode(session, request, source, sequence.time_left_s)


def _source(message: node_pb2.DecodeRequest) -> PullSource | None:
    if not message.HasField("lease"):
        return None
    return PullSource(
        address=message.transfer_address,
        incarnation=message.lease.prefill_incarnation,
        lease=message.lease.number,
        exports=tuple(export_of(handle) for handle in message.exports),
    )
