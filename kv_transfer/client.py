"""The target's door: the Pulls of a decode leader; layouts and exports from messages. Moves no KV itself."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import grpc

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Incompatible, InvalidRequest, LeaseLost, NodeLost
from baton.v1 import inference_pb2, node_pb2, transfer_pb2
from baton.wire import error_from_message, finish_from_message, logprob_from_message
from kv_transfer.layout import KVLayout
from kv_transfer.lease import Announced, FinalToken
from kv_transfer.line import Inbox, Line, Lines, OpenChannel
from kv_transfer.nonsense import nonsense
from kv_transfer.transport import NONCE_BYTES, Export

MAX_CHANNELS = 64
PROGRESS_S = 1.0


class PullClient:
    """Opens Pulls at prefill leaders over one stream per address. One event loop owns it; ended by `close`.

    handshake_s: within it a peer must answer a Pull or a release, or it counts as lost. open_channel: how (TLS) to connect.
    max_channels: how many are kept while no Pull uses them. progress_s: how often a source is told, at most, that reads go on.
    """

    def __init__(
        self,
        *,
        handshake_s: float = 5.0,
        open_channel: OpenChannel = rpc.open_channel,
        max_channels: int = MAX_CHANNELS,
        progress_s: float = PROGRESS_S,
    ) -> None:
        self._handshake_s = handshake_s
        self._progress_s = progress_s
        self._lines = Lines(open_channel, max_channels)

    @property
    def num_channels(self) -> int:
        """Channels kept or in use."""
        return len(self._lines)

    def pull(self, address: str, incarnation: bytes, number: int, attempt: int, have_blocks: int, deadline: Deadline) -> Pull:
        """A Pull of lease (incarnation, number), not yet open: `async with` opens it. `have_blocks` leading blocks are not announced."""
        opening = transfer_pb2.PullOpen(
            lease=node_pb2.LeaseId(prefill_incarnation=incarnation, number=number),
            attempt=attempt,
            have_blocks=have_blocks,
            protocol_version=PROTOCOL_VERSION,
        )
        return Pull(self._lines, address, opening, self._handshake_s, deadline, self._progress_s)

    async def close(self) -> None:
        """Close all channels; Pulls under way end with NodeLost."""
        await self._lines.close()


class Pull:
    """One Pull: `async with client.pull(...) as pull: async for announced in pull: ...; await pull.release()`.

    Leaving the `async with` tells the source that no read of this attempt is under way any more: leave only when all tickets are
    quiesced. Without `release` the lease stays, for another attempt.
    Every method raises LeaseLost (revoked, expired, fenced, failed), NodeLost, Incompatible, or DeadlineExceeded; after that only
    leaving is left.
    """

    def __init__(
        self,
        lines: Lines,
        address: str,
        opening: transfer_pb2.PullOpen,
        handshake_s: float,
        deadline: Deadline,
        progress_s: float = PROGRESS_S,
    ) -> None:
        self._lines = lines
        self._address = address
        self._opening = opening
        self._handshake_s = handshake_s
        self._deadline = deadline
        self._progress_s = progress_s
        self._line: Line | None = None
        self._number = 0
        self._inbox = Inbox()
        self._released = False
        self._complete = False
        self._lost = False  # the peer: another Pull should try another channel
        self._said_s = now_s()  # when the peer last heard of us

    async def __aenter__(self) -> Self:
        self._line = self._lines.take(self._address)
        self._number, self._inbox = self._line.join()
        try:
            self._say(transfer_pb2.PullRequest(open=self._opening))
            await self._answer("queued")
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._leave()

    async def _leave(self) -> None:
        assert self._line is not None
        if not self._released:
            self._say(transfer_pb2.PullRequest(leave=transfer_pb2.PullLeave()))
        self._line.leave(self._number)
        await self._lines.give_back(self._line, lost=self._lost)

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

    def progress(self) -> None:
        """Say, at most every progress_s, that reads go on, so that the lease does not expire under them."""
        if now_s() - self._said_s >= self._progress_s:
            self._said_s = now_s()
            self._say(transfer_pb2.PullRequest(progress=transfer_pb2.PullProgress()))

    async def release(self) -> None:
        """All reads have ended well: the source may use the blocks again. Only after the final announcement; returns when it is agreed."""
        self._say(transfer_pb2.PullRequest(release=transfer_pb2.PullRelease(attempt=self._opening.attempt)))
        await self._answer("released")
        self._released = True

    async def _answer(self, expected: str) -> None:
        """Wait for it, at most until the handshake deadline."""
        try:
            async with asyncio.timeout(self._deadline.sooner(self._handshake_s).left_s()):
                reply = await self._read()
        except TimeoutError as error:
            raise self._silent() from error
        if reply.WhichOneof("reply") != expected:
            raise self._nonsense(reply)

    def _say(self, request: transfer_pb2.PullRequest) -> None:
        assert self._line is not None, "enter the Pull first"
        request.pull = self._number
        self._line.say(request)

    def _silent(self) -> BatonError:
        if self._deadline.passed():
            return DeadlineExceeded("no time left for the Pull", stage="pull", node=self._address)
        self._lost = True
        message = f"{self._address} has not answered the Pull within {self._handshake_s} s"
        return NodeLost(message, stage="pull", node=self._address, cause="handshake")

    async def _read(self) -> transfer_pb2.PullReply:
        reply = await self._inbox.get()
        if isinstance(reply, grpc.RpcError):
            raise self._broken(reply) from reply
        if reply is None:
            self._lost = True
            raise NodeLost(f"the line to {self._address} was closed", stage="pull", node=self._address)
        if reply.WhichOneof("reply") == "error":
            raise _refused(reply.error)
        return reply

    def _broken(self, error: grpc.RpcError) -> BatonError:
        """What a broken stream stands for; nobody but the node itself cancels it from the other end, when it goes down."""
        cause = rpc.to_error(error, stage="pull", node=self._address)
        if isinstance(cause, Cancelled):
            cause = NodeLost(cause.message, stage="pull", node=self._address)
        self._lost |= isinstance(cause, NodeLost)
        return cause

    def _nonsense(self, reply: transfer_pb2.PullReply) -> BatonError:
        return nonsense(f"{self._address} answers a Pull with {reply.WhichOneof('reply')}", node=self._address)


def _refused(detail: inference_pb2.ErrorDetail) -> BatonError:
    """Whatever ended the lease there, here the blocks are gone and another attempt makes sense; prefill tells the router the rest.

    Peers that do not understand each other are no better off with another lease.
    """
    said = error_from_message(detail, LeaseLost)
    kind = Incompatible if said.cause == Incompatible.default_cause else LeaseLost
    return kind(said.message, stage=said.stage, node=said.node, cause=said.cause)


def layout_of(message: node_pb2.KVLayout) -> KVLayout:
    """The inverse of kv_transfer.server.layout_message. Raises Incompatible if it describes nothing that can exist."""
    return KVLayout(
        axes=tuple(message.axes),
        num_blocks=message.num_blocks,
        block_size=message.block_size,
        layer_start=message.layer_start,
        num_layers=message.num_layers,
        part_dims=tuple(message.part_dims),
        head_start=message.head_start,
        num_heads=message.num_heads,
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
    """Raises Incompatible for what no announcement can hold, whatever was announced before."""
    if len(message.block_ids) != len(message.generations):
        raise nonsense(f"a source announces {len(message.block_ids)} blocks with {len(message.generations)} generations")
    final = _final_of(message.final) if message.HasField("final") else None
    return Announced(message.first_block, tuple(message.block_ids), tuple(message.generations), final)


def _final_of(message: transfer_pb2.FinalToken) -> FinalToken:
    try:
        return FinalToken(
            output_index=message.output_index,
            token_id=message.token_id,
            logprob=logprob_from_message(message.logprob) if message.HasField("logprob") else None,
            finish_reason=finish_from_message(message.finish_reason),
        )
    except InvalidRequest as error:  # not the client's fault
        raise nonsense(f"a source's final token makes no sense: {error.message}") from error
