"""The gRPC face of a prefill node's leader: control commands in, events out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from baton import wire
from baton.errors import BatonError
from baton.v1 import node_pb2, node_pb2_grpc, transfer_pb2_grpc
from prefill_node.leader import PrefillLeader
from ranks.control import serve_control
from ranks.session import Session

SERVICES = ("baton.v1.PrefillNode", "baton.v1.Transfer")


def add_services(server: grpc.aio.Server, leader: PrefillLeader) -> None:
    """Have `server` answer routers and pulls."""
    node_pb2_grpc.add_PrefillNodeServicer_to_server(PrefillService(leader), server)
    transfer_pb2_grpc.add_TransferServicer_to_server(leader.transfer, server)


class PrefillService(node_pb2_grpc.PrefillNodeServicer):
    """baton.v1.PrefillNode over one leader."""

    def __init__(self, leader: PrefillLeader) -> None:
        self._leader = leader

    async def Control(
        self,
        request_iterator: AsyncIterator[node_pb2.PrefillCommand],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        """See proto."""
        await serve_control(request_iterator, context, self._leader, self._take)

    def _take(self, session: Session, command: node_pb2.PrefillCommand) -> None:
        match command.WhichOneof("command"):
            case "prefill":
                self._prefill(session, command.prefill)
            case "accepted":
                self._leader.accept(command.accepted.lease_number)
            case "cancel":
                self._leader.desk.cancel(session, command.cancel.request_id, command.cancel.attempt, command.cancel.reason)
            case "check":
                self._leader.desk.check(session, command.check.request_id, command.check.attempt)
            case "flush":
                session.flushed(command.flush.number, self._leader.pool.drop_cache())

    def _prefill(self, session: Session, message: node_pb2.PrefillRequest) -> None:
        sequence = message.sequence
        try:
            request = wire.sequence_from_message(sequence)
        except BatonError as error:
            self._leader.desk.refuse(session, (sequence.request_id, sequence.attempt), error)
            return
        self._leader.prefill(session, request, message.lease_number, sequence.time_left_s)
