"""The router's end of the control streams: one `NodeLink` per group leader.

Knows messages, streams, beats and reconnecting; nothing of what a request is about. What a node says comes out as plain
`Heard` values through a `Listener`; what the router says goes into a bounded queue that one task writes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc

from baton.config import PROTOCOL_VERSION
from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    LeaseLost,
    NodeLost,
    ResourceExhausted,
    Unavailable,
)
from baton.request import SequenceRequest
from baton.rpc import open_channel, to_error
from baton.v1 import node_pb2, node_pb2_grpc
from baton.wire import counts_from_message, error_from_message, sequence_to_message, token_event_from_message
from router.heard import GroupLoad, Heard, Hello, Layout, PullReport, Rank, SequenceFailed
from router.registry import Role

log = logging.getLogger(__name__)

MAX_QUEUED_COMMANDS = 16_384
HELLO_PATIENCE_S = 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0
_KINDS: dict[int, type[BatonError]] = {
    grpc.StatusCode[kind.status].value[0]: kind
    for kind in (InternalError, InvalidRequest, Cancelled, Unavailable, DeadlineExceeded, ResourceExhausted, Incompatible)
}
_KINDS_BY_CAUSE: dict[str, type[BatonError]] = {kind.default_cause: kind for kind in (NodeLost, LeaseLost)}

OpenChannel = Callable[[str], grpc.aio.Channel]
Command = node_pb2.PrefillCommand | node_pb2.DecodeCommand
Call = grpc.aio.StreamStreamCall[Command, node_pb2.NodeEvent]


class Listener(Protocol):
    """Who is told what a node says. Called on the loop; must not block or raise."""

    def heard(self, link: NodeLink, heard: Heard) -> None:
        """A message arrived."""

    def lost(self, link: NodeLink, error: NodeLost) -> None:
        """The stream of a node that had said hello is gone: nothing sent before counts any more."""

    def refused(self, link: NodeLink, error: Incompatible) -> None:
        """The node and this router do not understand each other; they try again until they do, and this is said every time."""


class NodeLink:
    """One long-lived Control stream to a group leader, made anew whenever it breaks, until `close`.

    The outgoing queue belongs to one stream and ends with it. If it overflows, the node does not read, and the stream is
    broken on purpose. Cancels that find no stream are owed: the next stream pays them first if the node is still in the same
    life (a node that comes back in another has forgotten the sequences anyway).
    """

    def __init__(
        self,
        role: Role,
        address: str,
        listener: Listener,
        router_incarnation: bytes,
        *,
        beat_s: float = 1.0,
        max_missed_beats: int = 6,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.role = role
        self.address = address
        self._listener = listener
        self._router_incarnation = router_incarnation
        self._beat_s = beat_s
        self._patience_s = beat_s * max_missed_beats
        self._channel = open_channel(address)
        self._outbox: asyncio.Queue[Command] | None = None
        self._hello: node_pb2.NodeHello | None = None
        self._name = address
        self._incarnation = b""
        self._last_heard_s = 0.0
        self._owed: dict[str, node_pb2.Cancel] = {}
        self._overflow = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def up(self) -> bool:
        """Whether the node has said hello on a stream that is still open."""
        return self._outbox is not None and self._hello is not None

    @property
    def suspect(self) -> bool:
        """Whether half the patience has gone by in silence: such a node gets no new work."""
        return asyncio.get_running_loop().time() - self._last_heard_s > self._patience_s / 2

    def start(self) -> None:
        """Connect, and stay connected, in the background."""
        self._task = asyncio.create_task(self._stay_connected(), name=f"link to {self.role} {self.address}")

    async def close(self) -> None:
        """End the stream for good, without a `lost`."""
        # A flag beside the cancellation: a task group forgets that it was cancelled if one of its tasks fails meanwhile.
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._outbox = None
        await self._channel.close(None)

    def prefill(self, sequence: SequenceRequest, lease_number: int, time_left_s: float) -> None:
        """Have a prefill node compute a sequence's prompt; lease 0: nobody will pull. Raises NodeLost."""
        message = sequence_to_message(sequence, time_left_s)
        self._send(prefill=node_pb2.PrefillRequest(sequence=message, lease_number=lease_number))

    def accepted(self, lease_number: int) -> None:
        """Tell a prefill node that a decode group has reserved room for the reader of this lease. Raises NodeLost."""
        self._send(accepted=node_pb2.DecodeAccepted(lease_number=lease_number))

    def decode(self, sequence: SequenceRequest, source: NodeLink, lease_number: int, time_left_s: float, *, introduce: bool) -> None:
        """Have a decode group pull a lease of the prefill node `source` and generate. Raises NodeLost.

        introduce: say where the ranks of `source` can be read, which the group remembers from its first pull on.
        """
        if source._hello is None:
            raise NodeLost(f"the prefill node at {source.address} is gone", stage="router", node=source.address)
        request = node_pb2.DecodeRequest(
            sequence=sequence_to_message(sequence, time_left_s),
            lease=node_pb2.LeaseId(prefill_incarnation=source._hello.incarnation, number=lease_number),
            transfer_address=source._hello.transfer_address,
            exports=source._hello.exports if introduce else (),
        )
        self._send(decode=request)

    def cancel(self, request_id: str, attempt: int, reason: str) -> None:
        """End this attempt and all before it on the node; owed if there is no stream now, or none that is read. Never raises."""
        self._pay(node_pb2.Cancel(request_id=request_id, attempt=attempt, reason=reason))

    def flush_cache(self, number: int) -> None:
        """Have the group forget cached blocks that nobody uses; it answers with `number`. Raises NodeLost."""
        self._send(flush=node_pb2.FlushCache(number=number))

    def _pay(self, cancel: node_pb2.Cancel) -> None:
        try:
            self._send(cancel=cancel)
        except NodeLost:
            self._owed[cancel.request_id] = cancel

    def _send(self, **command: object) -> None:
        if self._outbox is None or self._hello is None:
            raise NodeLost(f"there is no stream to the {self.role} node at {self.address}", stage="router", node=self._name)
        try:
            self._outbox.put_nowait(self._command(**command))
        except asyncio.QueueFull:
            self._overflow.set()
            raise self._unread() from None

    def _unread(self) -> NodeLost:
        return NodeLost(f"{self._name} has left {MAX_QUEUED_COMMANDS} commands unread", stage="router", node=self._name)

    def _command(self, **command: object) -> Command:
        kind: Callable[..., Command] = node_pb2.PrefillCommand if self.role is Role.PREFILL else node_pb2.DecodeCommand
        return kind(**command)

    async def _stay_connected(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            error = await self._one_stream()
            was_up = self.up
            self._outbox = None
            if self._closed:
                return
            if was_up:
                retry_s = _FIRST_RETRY_S
                log.warning("lost %s: %s", error.node, error)
                self._listener.lost(self, error if isinstance(error, NodeLost) else NodeLost(error.message, node=error.node))
            if isinstance(error, Incompatible):
                self._listener.refused(self, error)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _one_stream(self) -> NodeLost | Incompatible:
        """Run a stream until it breaks; returns why. An edge: a bug while listening costs the stream, not the link."""
        error: NodeLost | Incompatible = NodeLost(f"the stream to {self._name} ended", node=self._name)
        call = self._open()
        outbox: asyncio.Queue[Command] = asyncio.Queue(MAX_QUEUED_COMMANDS)
        self._outbox, self._overflow, self._hello = outbox, asyncio.Event(), None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call, outbox))
                tasks.create_task(self._beat(outbox))
                tasks.create_task(self._watch_overflow())
                await self._read(call)
        except* Exception as group:
            error = self._why(group.exceptions[0])
        finally:
            call.cancel()
        return error

    def _open(self) -> Call:
        stub = node_pb2_grpc.PrefillNodeStub if self.role is Role.PREFILL else node_pb2_grpc.DecodeNodeStub
        call: Call = stub(self._channel).Control()
        return call

    async def _write(self, call: Call, outbox: asyncio.Queue[Command]) -> None:
        greeting = node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=self._router_incarnation)
        await call.write(self._command(hello=greeting))
        while True:
            await call.write(await outbox.get())

    async def _beat(self, outbox: asyncio.Queue[Command]) -> None:
        number = 0
        while True:
            await asyncio.sleep(self._beat_s)
            number += 1
            if not outbox.full():
                outbox.put_nowait(self._command(beat=node_pb2.Beat(number=number)))

    async def _watch_overflow(self) -> None:
        await self._overflow.wait()
        raise self._unread()

    async def _read(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(HELLO_PATIENCE_S) as patience:
            async for event in call:
                self._last_heard_s = loop.time()
                patience.reschedule(self._last_heard_s + self._patience_s)
                if event.HasField("hello"):
                    self._met(event.hello)
                self._listener.heard(self, heard_from_message(event))
        raise NodeLost(f"{self._name} closed its stream", node=self._name)

    def _met(self, hello: node_pb2.NodeHello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            versions = f"protocol {hello.protocol_version}, this router {PROTOCOL_VERSION}; update the older one"
            raise Incompatible(f"{hello.node} at {self.address} speaks {versions}", stage="router", node=hello.node)
        same_life = self._incarnation == hello.incarnation
        self._hello, self._name, self._incarnation = hello, hello.node, hello.incarnation
        owed, self._owed = self._owed, {}
        if same_life:
            for cancel in owed.values():
                self._pay(cancel)

    def _why(self, error: Exception) -> NodeLost | Incompatible:
        name = self._name
        match error:
            case NodeLost() | Incompatible():
                return error
            case TimeoutError():
                return NodeLost(f"{name} said nothing for {self._patience_s:g} s", stage="router", node=name)
            case grpc.aio.AioRpcError():
                told = to_error(error, stage="router", node=name)
                if isinstance(told, Incompatible):
                    return Incompatible(f"the {self.role} node at {self.address} says: {told.message}", stage="router", node=name)
                return NodeLost(f"the stream to {name} broke: {error.details() or error.code().name}", stage="router", node=name)
        log.error("the stream to %s broke for a reason of ours", name, exc_info=error)
        return NodeLost(f"the stream to {name} broke: {error!r}", stage="router", node=name)


def heard_from_message(event: node_pb2.NodeEvent) -> Heard:
    """A node's message as plain values."""
    hello = event.hello if event.HasField("hello") else None
    load = event.load if event.HasField("load") else (hello.load if hello else None)
    return Heard(
        hello=hello_from_message(hello) if hello else None,
        load=load_from_message(load) if load else None,
        tokens=tuple(token_event_from_message(token) for token in event.tokens),
        accepted=tuple((item.request_id, item.attempt) for item in event.accepted),
        failed=tuple(_failed(item) for item in event.errors),
        pulls=_pulls(event.pulls),
        flushed=tuple((item.number, item.blocks) for item in event.flushed),
    )


def hello_from_message(message: node_pb2.NodeHello) -> Hello:
    """Who a node says it is."""
    layout = message.layout
    return Hello(
        node=message.node,
        group=message.group,
        incarnation=message.incarnation,
        protocol_version=message.protocol_version,
        model_fingerprint=message.model_fingerprint,
        dtype=message.dtype,
        quantization=message.quantization,
        max_model_len=message.max_model_len,
        layout=Layout(
            axes=tuple(layout.axes),
            block_size=layout.block_size,
            part_dims=tuple(layout.part_dims),
            dtype=layout.dtype,
            model_num_layers=layout.model_num_layers,
            model_num_kv_heads=layout.model_num_kv_heads,
        ),
        ranks=tuple(Rank(rank.rank, rank.pid, rank.host) for rank in message.ranks),
        transfer_address=message.transfer_address,
    )


def load_from_message(message: node_pb2.Load) -> GroupLoad:
    """A group's figures."""
    return GroupLoad(
        waiting_sequences=message.waiting_sequences,
        running_sequences=message.running_sequences,
        waiting_tokens=message.waiting_tokens,
        blocks=counts_from_message(message.blocks),
        open_leases=message.open_leases,
        open_pulls=message.open_pulls,
        steps=message.steps,
        step_seconds=message.step_seconds,
        draining=message.draining,
    )


def _failed(message: node_pb2.SequenceError) -> SequenceFailed:
    kind = _KINDS_BY_CAUSE.get(message.error.cause) or _KINDS.get(message.code, InternalError)
    return SequenceFailed(message.request_id, message.attempt, error_from_message(message.error, kind))


def _pulls(messages: Sequence[node_pb2.PullReport]) -> tuple[PullReport, ...]:
    return tuple(
        PullReport(
            request_id=message.request_id,
            attempt=message.attempt,
            blocks_pulled=message.blocks_pulled,
            blocks_matched=message.blocks_matched,
            bytes_pulled=message.bytes_pulled,
            seconds=message.seconds,
            exposed_s=message.exposed_s,
            transport=message.transport,
        )
        for message in messages
    )
