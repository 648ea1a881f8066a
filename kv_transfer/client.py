"""The target's door: the Pull streams of a decode leader; layouts and exports from messages. Moves no KV itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Incompatible, InvalidRequest, LeaseLost, NodeLost
from baton.v1 import inference_pb2, node_pb2, transfer_pb2, transfer_pb2_grpc
from baton.wire import error_from_message, finish_from_message, logprob_from_message
from kv_transfer.layout import KVLayout
from kv_transfer.lease import Announced, FinalToken
from kv_transfer.nonsense import nonsense
from kv_transfer.transport import NONCE_BYTES, Export

OpenChannel = Callable[[str], grpc.aio.Channel]
PullCall = grpc.aio.StreamStreamCall[transfer_pb2.PullRequest, transfer_pb2.PullReply]
MAX_CHANNELS = 64
PROGRESS_S = 1.0


def surplus(open_pulls: Mapping[str, int], most: int) -> tuple[str, ...]:
    """The addresses to hang up on so that `most` remain: those without a Pull, least recently used first; fewer if too few are idle.

    open_pulls: number of open Pulls by address, least recently used first. Pure.
    """
    idle = [address for address, num_pulls in open_pulls.items() if not num_pulls]
    return tuple(idle[: max(0, len(open_pulls) - most)])


@dataclass(slots=True, eq=False)
class _Line:
    """A channel to one address and the Pulls that use it."""

    address: str
    channel: grpc.aio.Channel
    open_pulls: int = 0
    closed: bool = False

    async def hang_up(self) -> None:
        """Close the channel, once."""
        if not self.closed:
            self.closed = True
            await self.channel.close(None)


class Lines:
    """One line per address. A line on which a peer was lost is taken by no further Pull, and closed when its last one ends.

    But of a node that went away while no Pull was open nobody hears, and when it comes back it has another address: so at most `most`
    are kept, apart from those in use. A line is also closed when a Pull ends and too many are left, and by `close`.
    """

    def __init__(self, open_channel: OpenChannel, most: int) -> None:
        self._open_channel = open_channel
        self._most = most
        self._lines: dict[str, _Line] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._lines)

    def take(self, address: str) -> _Line:
        """The line to an address, for one more Pull, which gives it back."""
        line = self._lines.pop(address, None) or _Line(address, self._open_channel(address))
        self._lines[address] = line
        line.open_pulls += 1
        return line

    async def give_back(self, line: _Line, *, lost: bool = False) -> None:
        """One Pull has ended; lost: because its peer was."""
        line.open_pulls -= 1
        if lost and self._lines.get(line.address) is line:
            del self._lines[line.address]
        # All at once, before anybody else runs: one that is still listed while another is closed could be taken by a new Pull.
        for closing in self._superfluous(line):
            await closing.hang_up()

    def _superfluous(self, line: _Line) -> list[_Line]:
        if self._lines.get(line.address) is not line:
            return [] if line.open_pulls else [line]
        gone = surplus({address: known.open_pulls for address, known in self._lines.items()}, self._most)
        return [self._lines.pop(address) for address in gone]

    async def close(self) -> None:
        """Close all; Pulls end with NodeLost."""
        lines, self._lines = self._lines, {}
        for line in lines.values():
            await line.hang_up()


class PullClient:
    """Opens Pulls at prefill leaders over one channel per address. One event loop owns it; ended by `close`.

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
    """One Pull stream: `async with client.pull(...) as pull: async for announced in pull: ...; await pull.release()`.

    Leaving the `async with` closes the stream, and that tells the source that no read of this attempt is under way any more: leave
    only when all tickets are quiesced. Without `release` the lease stays, for another attempt.
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
        self._line: _Line | None = None
        self._call: PullCall | None = None
        self._complete = False
        self._lost = False  # the peer: another Pull should try another channel
        self._said_s = now_s()  # when the peer last heard of us

    async def __aenter__(self) -> Self:
        self._line = self._lines.take(self._address)
        self._call = transfer_pb2_grpc.TransferStub(self._line.channel).Pull()
        try:
            await self._ask(transfer_pb2.PullRequest(open=self._opening), "queued")
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._leave()

    async def _leave(self) -> None:
        assert self._call is not None and self._line is not None
        self._call.cancel()
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

    async def progress(self) -> None:
        """Say, at most every progress_s, that reads go on, so that the lease does not expire under them."""
        if now_s() - self._said_s < self._progress_s:
            return
        self._said_s = now_s()
        try:
            async with asyncio.timeout(self._deadline.sooner(self._handshake_s).left_s()):
                await self._say(transfer_pb2.PullRequest(progress=transfer_pb2.PullProgress()))
        except TimeoutError as error:
            raise self._silent() from error

    async def release(self) -> None:
        """All reads have ended well: the source may use the blocks again. Only after the final announcement; returns when it is agreed."""
        await self._ask(transfer_pb2.PullRequest(release=transfer_pb2.PullRelease(attempt=self._opening.attempt)), "released")

    async def _ask(self, request: transfer_pb2.PullRequest, answer: str) -> None:
        """Say something and be answered, both within the handshake deadline."""
        try:
            async with asyncio.timeout(self._deadline.sooner(self._handshake_s).left_s()):
                await self._say(request)
                reply = await self._read()
        except TimeoutError as error:
            raise self._silent() from error
        if reply.WhichOneof("reply") != answer:
            raise self._nonsense(reply)

    async def _say(self, request: transfer_pb2.PullRequest) -> None:
        assert self._call is not None, "enter the Pull first"
        # A call that is over says why when it is read.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.write(request)

    def _silent(self) -> BatonError:
        if self._deadline.passed():
            return DeadlineExceeded("no time left for the Pull", stage="pull", node=self._address)
        self._lost = True
        message = f"{self._address} has not answered the Pull within {self._handshake_s} s"
        return NodeLost(message, stage="pull", node=self._address, cause="handshake")

    async def _read(self) -> transfer_pb2.PullReply:
        assert self._call is not None, "enter the Pull first"
        try:
            reply = await self._call.read()
        except grpc.RpcError as error:
            raise self._broken(error) from error
        if not isinstance(reply, transfer_pb2.PullReply):
            raise NodeLost(f"{self._address} has closed the Pull", stage="pull", node=self._address)
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
