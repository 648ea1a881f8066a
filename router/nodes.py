"""The router's end of the control streams: one `NodeLink` per group leader.

Knows messages, streams, beats and reconnecting; nothing of what a request is about, and judges nobody's silence. What a node says
comes out as plain `Heard` values through a `Listener`; what the router says goes into a bounded queue that one task writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import grpc

from baton.config import PROTOCOL_VERSION, MembershipConfig
from baton.deadline import now_s
from baton.errors import BatonError, Incompatible, InvalidRequest, NodeLost
from baton.request import SequenceRequest
from baton.rpc import open_channel, to_error
from baton.v1 import node_pb2, node_pb2_grpc
from baton.wire import sequence_to_message
from router.group import Role
from router.heard import Heard
from router.said import heard_from_message

log = logging.getLogger(__name__)

MAX_QUEUED_COMMANDS = 16_384
HELLO_PATIENCE_S = 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0

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


class _Stream:
    """What belongs to one stream and ends with it: the commands not written yet, and what the node has not taken of those sent.

    unread: (number of the command, its tokens, those that are to be computed) of every sequence sent; an entry ends when the node says
    that it has taken it.
    """

    def __init__(self) -> None:
        self.hello: node_pb2.NodeHello | None = None
        self.outbox: asyncio.Queue[Command] = asyncio.Queue(MAX_QUEUED_COMMANDS)
        self.unread: deque[tuple[int, int, int]] = deque(maxlen=MAX_QUEUED_COMMANDS)
        self._num_put = 0
        self._end: NodeLost | None = None
        self._ended = asyncio.Event()

    def put(self, command: Command, num_tokens: int = 0, num_computed: int = 0) -> None:
        """Have a command written; num_tokens: of the sequence in it, num_computed: those that the node computes. Raises QueueFull."""
        self.outbox.put_nowait(command)
        self._num_put += 1
        if num_tokens:
            self.unread.append((self._num_put, num_tokens, num_computed))

    def taken(self, load: node_pb2.Load) -> None:
        """The node said how far it has read; one that does not count is taken to have read all."""
        while self.unread and (not load.HasField("taken") or self.unread[0][0] <= load.taken):
            self.unread.popleft()

    def end(self, error: NodeLost) -> None:
        """Break the stream on purpose."""
        self._end = self._end or error
        self._ended.set()

    async def watch(self) -> None:
        """Raise what the stream was broken for, once it is."""
        await self._ended.wait()
        assert self._end is not None
        raise self._end


class NodeLink:
    """One long-lived Control stream to a group leader, made anew whenever it breaks, until `close`.

    The outgoing queue belongs to one stream and ends with it. If it overflows, the node does not read, and the stream is
    broken on purpose. Cancels that find no stream are owed: the next stream pays them first if the node is still in the same
    life (a node that comes back in another has forgotten the sequences anyway).

    heard_s: when the node last said anything, be it that it refuses this router; at first, when the link was started.
    trouble: why there is no stream, in the words of the last attempt; "" before the first failure.
    """

    def __init__(
        self,
        role: Role,
        address: str,
        listener: Listener,
        router_incarnation: bytes,
        membership: MembershipConfig,
        *,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.role = role
        self.address = address
        self.heard_s = 0.0
        self.trouble = ""
        self._listener = listener
        self._router_incarnation = router_incarnation
        self._beat_s = membership.beat_s
        self._last_retry_s = min(_LAST_RETRY_S, membership.dead_s / 3)  # a node that refuses must be heard to do so
        self._channel = open_channel(address)
        self._stream: _Stream | None = None
        self._name = address
        self._incarnation = b""
        self._owed: dict[str, node_pb2.Cancel] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def introduction(self) -> node_pb2.NodeHello | None:
        """What the node said of itself on the stream that is open now."""
        return self._stream.hello if self._stream else None

    @property
    def up(self) -> bool:
        """Whether the node has said hello on a stream that is still open."""
        return self.introduction is not None

    @property
    def unread(self) -> tuple[int, int, int]:
        """Sequences sent that the node has not taken yet, their tokens, and those it computes: its load does not include them."""
        waiting = self._stream.unread if self._stream else ()
        return len(waiting), sum(num_tokens for _, num_tokens, _ in waiting), sum(num_computed for _, _, num_computed in waiting)

    def start(self) -> None:
        """Connect, and stay connected, in the background."""
        self.heard_s = now_s()
        self._task = asyncio.create_task(self._stay_connected(), name=f"link to {self.role} {self.address}")

    async def close(self) -> None:
        """End the stream for good, without a `lost`."""
        # A flag beside the cancellation: a task group forgets that it was cancelled if one of its tasks fails meanwhile.
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._stream = None
        await self._channel.close(None)

    def give_up(self, error: NodeLost) -> None:
        """Break the stream, without a `lost`: whoever calls knows. Nothing more is heard on it; another is tried for at once."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.end(error)

    def prefill(self, sequence: SequenceRequest, lease_number: int, time_left_s: float) -> None:
        """Have a prefill node compute a sequence's prompt; lease 0: nobody will pull. Raises NodeLost."""
        request = node_pb2.PrefillRequest(sequence=sequence_to_message(sequence, time_left_s), lease_number=lease_number)
        self._send(_num_tokens(sequence), _num_tokens(sequence), prefill=request)

    def accepted(self, lease_number: int) -> None:
        """Tell a prefill node that a decode group has reserved room for the reader of this lease. Raises NodeLost."""
        self._send(accepted=node_pb2.DecodeAccepted(lease_number=lease_number))

    def decode(
        self, sequence: SequenceRequest, source: NodeLink | None, lease_number: int, time_left_s: float, *, introduce: bool = True
    ) -> None:
        """Have a decode group generate; it pulls a lease of the prefill node `source`, or (None) computes the prompt itself.

        introduce: say where the ranks of `source` can be read, which the group remembers from its first pull on. Raises NodeLost.
        """
        request = node_pb2.DecodeRequest(sequence=sequence_to_message(sequence, time_left_s))
        if source is not None:
            hello = source.introduction
            if hello is None:
                raise NodeLost(f"the prefill node at {source.address} is gone", stage="router", node=source.address)
            request.lease.prefill_incarnation, request.lease.number = hello.incarnation, lease_number
            request.transfer_address = hello.transfer_address
            request.exports.extend(hello.exports if introduce else ())
        self._send(_num_tokens(sequence), 0 if source else _num_tokens(sequence), decode=request)

    def check(self, request_id: str, attempt: int) -> None:
        """Ask whether an attempt that has been quiet is still there; the answer is a `known` or a failure. Raises NodeLost."""
        self._send(check=node_pb2.Check(request_id=request_id, attempt=attempt))

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

    def _send(self, num_tokens: int = 0, num_computed: int = 0, **command: object) -> None:
        if self._stream is None or self._stream.hello is None:
            raise NodeLost(f"there is no stream to the {self.role} node at {self.address}", stage="router", node=self._name)
        try:
            self._stream.put(self._command(**command), num_tokens, num_computed)
        except asyncio.QueueFull:
            unread = NodeLost(f"{self._name} has left {MAX_QUEUED_COMMANDS} commands unread", stage="router", node=self._name)
            self._stream.end(unread)
            raise unread from None

    def _command(self, **command: object) -> Command:
        kind: Callable[..., Command] = node_pb2.PrefillCommand if self.role is Role.PREFILL else node_pb2.DecodeCommand
        return kind(**command)

    async def _stay_connected(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            stream = self._stream = _Stream()
            error = await self._run(stream)
            if self._closed:
                return
            self._ended(stream, error)
            retry_s = _FIRST_RETRY_S if stream.hello else retry_s
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, self._last_retry_s)

    def _ended(self, stream: _Stream, error: NodeLost | Incompatible) -> None:
        given_up, self._stream, self.trouble = self._stream is not stream, None, error.message
        if stream.hello and not given_up:
            log.warning("lost %s: %s", error.node, error)
            self._listener.lost(self, error if isinstance(error, NodeLost) else NodeLost(error.message, node=error.node))
        if isinstance(error, Incompatible):
            self.heard_s = now_s()
            self._listener.refused(self, error)

    async def _run(self, stream: _Stream) -> NodeLost | Incompatible:
        """Run a stream until it breaks; returns why. An edge: a bug while listening costs the stream, not the link."""
        error: NodeLost | Incompatible = NodeLost(f"the stream to {self._name} ended", node=self._name)
        call = self._open()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call, stream))
                tasks.create_task(self._beat(stream))
                tasks.create_task(stream.watch())
                await self._read(call, stream)
        except* Exception as group:
            error = self._why(group.exceptions[0])
        finally:
            call.cancel()
        return error

    def _open(self) -> Call:
        stub = node_pb2_grpc.PrefillNodeStub if self.role is Role.PREFILL else node_pb2_grpc.DecodeNodeStub
        call: Call = stub(self._channel).Control()
        return call

    async def _write(self, call: Call, stream: _Stream) -> None:
        greeting = node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=self._router_incarnation)
        with contextlib.suppress(asyncio.InvalidStateError):  # it is over already: whoever reads it hears why
            await call.write(self._command(hello=greeting))
            while True:
                await call.write(await stream.outbox.get())

    async def _beat(self, stream: _Stream) -> None:
        number = 0
        while True:
            await asyncio.sleep(self._beat_s)
            number += 1
            if not stream.outbox.full():
                stream.put(self._command(beat=node_pb2.Beat(number=number)))

    async def _read(self, call: Call, stream: _Stream) -> None:
        async with asyncio.timeout(HELLO_PATIENCE_S) as patience:
            async for event in call:
                if self._stream is not stream:
                    break  # given up a moment ago
                self.heard_s = now_s()
                if not isinstance(event, node_pb2.NodeEvent):  # gRPC puts None in the place of what it cannot read
                    raise InvalidRequest("it sends bytes that are no message")
                heard = heard_from_message(event)
                if event.HasField("hello"):
                    patience.reschedule(None)  # from here on whoever listens judges the silence
                    self._met(stream, event.hello)
                elif stream.hello is None:
                    raise NodeLost(f"{self._name} spoke before its hello", stage="router", node=self._name)
                if event.HasField("load"):
                    stream.taken(event.load)
                self._listener.heard(self, heard)
        raise NodeLost(f"{self._name} closed its stream", node=self._name)

    def _met(self, stream: _Stream, hello: node_pb2.NodeHello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            versions = f"protocol {hello.protocol_version}, this router {PROTOCOL_VERSION}; update the older one"
            raise Incompatible(f"{hello.node} at {self.address} speaks {versions}", stage="router", node=hello.node)
        same_life = self._incarnation == hello.incarnation
        stream.hello, self._name, self._incarnation = hello, hello.node, hello.incarnation
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
                return NodeLost(f"{name} did not say hello within {HELLO_PATIENCE_S:g} s", stage="router", node=name)
            case grpc.aio.AioRpcError():
                told = to_error(error, stage="router", node=name)
                if isinstance(told, Incompatible):
                    return Incompatible(f"the {self.role} node at {self.address} says: {told.message}", stage="router", node=name)
                return NodeLost(f"the stream to {name} broke: {error.details() or error.code().name}", stage="router", node=name)
            case BatonError():
                return NodeLost(f"{name} cannot be understood: {error.message}", stage="router", node=name, cause="malformed")
        log.error("the stream to %s broke for a reason of ours", name, exc_info=error)
        return NodeLost(f"the stream to {name} broke: {error!r}", stage="router", node=name)


def _num_tokens(sequence: SequenceRequest) -> int:
    return len(sequence.prompt_ids) + len(sequence.emitted_ids)
