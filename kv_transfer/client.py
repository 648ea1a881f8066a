"""The target's door: the Pull streams of a decode leader; layouts and exports from messages. Moves no KV itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Incompatible, LeaseLost, NodeLost
from baton.v1 import inference_pb2, node_pb2, transfer_pb2, transfer_pb2_grpc
from baton.wire import finish_from_message, logprob_from_message
from kv_transfer.layout import KVLayout
from kv_transfer.lease import Announced, FinalToken
from kv_transfer.transport import NONCE_BYTES, Export

OpenChannel = Callable[[str], grpc.aio.Channel]
PullCall = grpc.aio.StreamStreamCall[transfer_pb2.PullRequest, transfer_pb2.PullReply]


class PullClient:
    """Opens Pulls at prefill leaders over one channel per address. One event loop owns it; ended by `close`.

    handshake_s: within it a peer must answer a Pull or a release, or it counts as lost. open_channel: how (TLS) to connect.
    """

    def __init__(self, *, handshake_s: float = 5.0, open_channel: OpenChannel = rpc.open_channel) -> None:
        self._handshake_s = handshake_s
        self._open_channel = open_channel
        self._channels: dict[str, grpc.aio.Channel] = {}  # an entry goes by forget or close

    def pull(self, address: str, incarnation: bytes, number: int, attempt: int, have_blocks: int, deadline: Deadline) -> Pull:
        """A Pull of lease (incarnation, number), not yet open: `async with` opens it. `have_blocks` leading blocks are not announced."""
        if address not in self._channels:
            self._channels[address] = self._open_channel(address)
        opening = transfer_pb2.PullOpen(
            lease=node_pb2.LeaseId(prefill_incarnation=incarnation, number=number),
            attempt=attempt,
            have_blocks=have_blocks,
            protocol_version=PROTOCOL_VERSION,
        )
        return Pull(self._channels[address], address, opening, self._handshake_s, deadline)

    async def forget(self, address: str) -> None:
        """Close the channel to a node that is gone; its Pulls end with NodeLost."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close(None)

    async def close(self) -> None:
        """Close all channels."""
        for address in tuple(self._channels):
            await self.forget(address)


class Pull:
    """One Pull stream: `async with client.pull(...) as pull: async for announced in pull: ...; await pull.release()`.

    Leaving the `async with` closes the stream, and that tells the source that no read of this attempt is under way any more: leave
    only when all tickets are quiesced. Without `release` the lease stays, for another attempt.
    Every method raises LeaseLost (revoked, expired, fenced, failed), NodeLost, or DeadlineExceeded; after that only leaving is left.
    """

    def __init__(
        self, channel: grpc.aio.Channel, address: str, opening: transfer_pb2.PullOpen, handshake_s: float, deadline: Deadline
    ) -> None:
        self._stub = transfer_pb2_grpc.TransferStub(channel)
        self._address = address
        self._opening = opening
        self._handshake_s = handshake_s
        self._deadline = deadline
        self._call: PullCall | None = None
        self._complete = False

    async def __aenter__(self) -> Self:
        self._call = self._stub.Pull()
        try:
            await self._ask(transfer_pb2.PullRequest(open=self._opening), "queued")
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._call is not None
        self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Announced:
        """The next announcement; ends after the final one."""
        if self._complete:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._deadline.left_s()):
                reply = await self._read()
        except TimeoutError as error:
            raise DeadlineExceeded("the source has announced nothing in time", stage="pull", node=self._address) from error
        if reply.WhichOneof("reply") != "announcement":
            raise self._nonsense(reply)
        announced = _announced_of(reply.announcement)
        self._complete = announced.final is not None
        return announced

    async def release(self) -> None:
        """All reads have ended well: the source may use the blocks again. Only after the final announcement; returns when it is agreed."""
        await self._ask(transfer_pb2.PullRequest(release=transfer_pb2.PullRelease(attempt=self._opening.attempt)), "released")

    async def _ask(self, request: transfer_pb2.PullRequest, answer: str) -> None:
        """Say something and be answered, both within the handshake deadline."""
        assert self._call is not None, "enter the Pull first"
        try:
            async with asyncio.timeout(self._deadline.sooner(self._handshake_s).left_s()):
                # A call that is over says why when it is read.
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    await self._call.write(request)
                reply = await self._read()
        except TimeoutError as error:
            if self._deadline.passed():
                raise DeadlineExceeded("no time left for the Pull", stage="pull", node=self._address) from error
            message = f"{self._address} has not answered the Pull within {self._handshake_s} s"
            raise NodeLost(message, stage="pull", node=self._address, cause="handshake") from error
        if reply.WhichOneof("reply") != answer:
            raise self._nonsense(reply)

    async def _read(self) -> transfer_pb2.PullReply:
        assert self._call is not None, "enter the Pull first"
        try:
            reply = await self._call.read()
        except grpc.RpcError as error:
            raise self._lost(error) from error
        if not isinstance(reply, transfer_pb2.PullReply):
            raise NodeLost(f"{self._address} has closed the Pull", stage="pull", node=self._address)
        if reply.WhichOneof("reply") == "error":
            raise _lease_lost(reply.error)
        return reply

    def _lost(self, error: grpc.RpcError) -> BatonError:
        """What a broken stream stands for; nobody but the node itself cancels it from the other end, when it goes down."""
        cause = rpc.to_error(error, stage="pull", node=self._address)
        return NodeLost(cause.message, stage="pull", node=self._address) if isinstance(cause, Cancelled) else cause

    def _nonsense(self, reply: transfer_pb2.PullReply) -> BatonError:
        return Incompatible(f"{self._address} answers a Pull with {reply.WhichOneof('reply')}", stage="pull", node=self._address)


def _lease_lost(detail: inference_pb2.ErrorDetail) -> LeaseLost:
    """Whatever ended the lease there, here the blocks are gone and another attempt makes sense; prefill tells the router the rest."""
    return LeaseLost(detail.message, stage=detail.stage, node=detail.node, cause=detail.cause)


def layout_of(message: node_pb2.KVLayout) -> KVLayout:
    """The inverse of kv_transfer.server.layout_message. Raises Incompatible if it describes nothing that can exist."""
    return KVLayout(
        axes=tuple(message.axes),
        num_blocks=message.num_blocks,
        block_size=message.block_size,
        layer_start=message.layer_start,
        num_layers=message.num_layers,
        num_parts=message.num_parts,
        head_start=message.head_start,
        num_heads=message.num_heads,
        head_dim=message.head_dim,
        dtype=message.dtype,
        model_num_layers=message.model_num_layers,
        model_num_kv_heads=message.model_num_kv_heads,
    )


def export_of(message: node_pb2.ExportHandle) -> Export:
    """The inverse of kv_transfer.server.export_message. Raises Incompatible if it describes nothing that can exist."""
    if len(message.nonce) != NONCE_BYTES:
        raise Incompatible(f"the nonce of source rank {message.rank} has {len(message.nonce)} bytes", stage="pull", cause="nonce")
    return Export(
        rank=message.rank,
        layout=layout_of(message.layout),
        host_id=message.host_id,
        shm_socket=message.shm_socket,
        tcp_address=message.tcp_address,
        nonce=message.nonce,
        pool_bytes=message.pool_bytes,
    )


def _announced_of(message: transfer_pb2.Announcement) -> Announced:
    if len(message.block_ids) != len(message.generations):
        raise Incompatible("an announcement has not one generation per block", stage="pull")
    final = _final_of(message.final) if message.HasField("final") else None
    return Announced(message.first_block, tuple(message.block_ids), tuple(message.generations), final)


def _final_of(message: transfer_pb2.FinalToken) -> FinalToken:
    return FinalToken(
        output_index=message.output_index,
        token_id=message.token_id,
        logprob=logprob_from_message(message.logprob) if message.HasField("logprob") else None,
        finish_reason=finish_from_message(message.finish_reason),
    )
