"""Prefill and decode nodes without a model: they speak the whole control protocol over real gRPC and say the prompt again.

Output token i of a prompt of n ids is prompt_ids[i % n], so every test knows the right answer. With step_s 0 they cost next to
nothing, which makes them the "zero-delay nodes" a router is measured with. No KV moves; faults are switched on through `Faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from baton.config import PROTOCOL_VERSION
from baton.errors import BatonError, Incompatible, NodeLost, Unavailable
from baton.request import BlockCounts, Drawn, SequenceRequest, TokenEvent, TokenLogprob
from baton.rpc import abort, bind, make_server
from baton.v1 import node_pb2, node_pb2_grpc
from baton.wire import counts_to_message, drawn_to_message, error_to_message, sequence_from_message, token_event_to_message

Command = node_pb2.PrefillCommand | node_pb2.DecodeCommand
Context = grpc.aio.ServicerContext[Any, Any]
BLOCK_SIZE = 16
NUM_BLOCKS = 1024
ECHO_LOGPROB = -0.5


def echo_id(sequence: SequenceRequest, index: int) -> int:
    """The token that echo nodes make at an output index."""
    return sequence.prompt_ids[index % len(sequence.prompt_ids)]


@dataclass(slots=True)
class Faults:
    """What goes wrong from now on; the ones with an index happen once.

    refuse: every new sequence ends with this error. fail_at: so does the one that reaches this output index.
    die_at: the stream breaks when a sequence reaches this output index. die_at_flush: it does when the node is told to flush.
    deadly: the stream breaks whenever a sequence is to make a token, as if each were what the node cannot survive.
    stutter: every event is said twice, and the first one of a sequence again with each later one.
    deaf: a router's protocol version is not looked at, as if this node knew of none.
    silent: sequences and flushes are taken and nothing is ever said about them.
    mute: nothing at all is said any more, not even loads or a hello, as if the process were stopped.
    quiet: beats and answers go on, but no sequence makes a token.
    forget: requests that arrive are lost, as if they never had: whoever asks for one hears that it is unknown.
    lose_at, lose_accepted: the event with this output index, or the router's word that decode has room, gets lost on its way, once.
    lie_at: another token is said at this output index, once.
    unreachable: pulls fail, since no prefill node answers them; what a group does alone works.
    unrefined: loads do not say how many commands were taken, as those of a node that does not count them.
    """

    refuse: BatonError | None = None
    fail_at: tuple[int, BatonError] | None = None
    die_at: int | None = None
    die_at_flush: bool = False
    deadly: bool = False
    stutter: bool = False
    deaf: bool = False
    silent: bool = False
    mute: bool = False
    quiet: bool = False
    forget: bool = False
    lose_at: int | None = None
    lose_accepted: bool = False
    lie_at: int | None = None
    unreachable: bool = False
    unrefined: bool = False


@dataclass(slots=True)
class EchoSequence:
    """One attempt under way on one stream: ends with its finish, a cancel, an error, or the stream."""

    request: SequenceRequest
    next_index: int
    runnable: bool
    first: TokenEvent | None = None


class EchoNode:
    """One group leader. `start` binds a free port; `stop` ends all streams. What it was told is kept for tests to look at."""

    def __init__(
        self,
        role: str,
        name: str,
        *,
        group: int = 0,
        step_s: float = 0.0,
        beat_s: float = 1.0,
        fingerprint: str = "echo",
        max_model_len: int = 4096,
        protocol_version: int = PROTOCOL_VERSION,
    ) -> None:
        self.role = role
        self.name = name
        self.group = group
        self.step_s = step_s
        self.beat_s = beat_s
        self.fingerprint = fingerprint
        self.max_model_len = max_model_len
        self.protocol_version = protocol_version
        self.incarnation = secrets.token_bytes(16)
        self.faults = Faults()
        self.received: list[SequenceRequest] = []
        self.cancelled: list[tuple[str, int]] = []
        self.checked: list[tuple[str, int]] = []
        self.draining = False
        self.leases: list[int] = []
        self.num_introductions = 0
        self.cached_blocks = 0
        self.flushes: list[int] = []
        self.sessions: list[Session] = []
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on loopback; returns host:port."""
        self._server = make_server()
        if self.role == "prefill":
            node_pb2_grpc.add_PrefillNodeServicer_to_server(PrefillService(self), self._server)
        else:
            node_pb2_grpc.add_DecodeNodeServicer_to_server(DecodeService(self), self._server)
        self.address = f"127.0.0.1:{bind(self._server, '127.0.0.1', port)}"
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        """End all streams at once."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def fail(self, request: SequenceRequest, error: BatonError) -> None:
        """Say that an attempt has failed, whether or not it is (still) here."""
        for session in self.sessions:
            session.fail(request.key, error)

    @property
    def num_active(self) -> int:
        """Sequences on the node now."""
        return sum(len(session.active) for session in self.sessions)

    @property
    def num_speaking(self) -> int:
        """Of them, those that have made some tokens here, which have very likely arrived."""
        sequences = (sequence for session in self.sessions for sequence in session.active.values())
        return sum(sequence.next_index > len(sequence.request.emitted_ids) + 5 for sequence in sequences)

    def hello(self) -> node_pb2.NodeHello:
        """Who the node says it is."""
        return node_pb2.NodeHello(
            protocol_version=self.protocol_version,
            node=self.name,
            group=self.group,
            incarnation=self.incarnation,
            model_fingerprint=self.fingerprint,
            dtype="float32",
            max_model_len=self.max_model_len,
            layout=node_pb2.KVLayout(
                axes=("block", "layer", "part", "head", "slot", "dim"),
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                num_layers=1,
                part_dims=(8, 8),
                num_heads=1,
                dtype="float32",
                model_num_layers=1,
                model_num_kv_heads=1,
            ),
            ranks=[node_pb2.RankInfo(rank=0, pid=os.getpid(), host="127.0.0.1")],
            transfer_address=self.address if self.role == "prefill" else "",
            exports=[node_pb2.ExportHandle(rank=0, tcp_address=self.address)] if self.role == "prefill" else [],
            load=self.load(),
        )

    def load(self) -> node_pb2.Load:
        """An empty pool and the sequences under way."""
        counts = BlockCounts(total=NUM_BLOCKS, free=NUM_BLOCKS, cached=0, held=0, quarantined=0)
        return node_pb2.Load(running_sequences=self.num_active, blocks=counts_to_message(counts), draining=self.draining)


class Session:
    """One router's stream: takes commands, makes one token per sequence and step, and says all of it in one event."""

    def __init__(self, node: EchoNode) -> None:
        self.active: dict[tuple[str, int], EchoSequence] = {}
        self._node = node
        self._by_lease: dict[int, tuple[str, int]] = {}
        self._num_taken = 0
        self._unsaid = node_pb2.NodeEvent()
        self._work = asyncio.Event()

    async def run(self, commands: AsyncIterator[Command], context: Context) -> None:
        """Serve the stream until either side ends it."""
        version = (await anext(commands)).hello.protocol_version
        if version != self._node.protocol_version and not self._node.faults.deaf:
            said = f"the router speaks protocol {version}, this node {self._node.protocol_version}"
            await abort(context, Incompatible(said, node=self._node.name))
        self._node.sessions.append(self)
        try:
            await self._unmuted()
            await context.write(node_pb2.NodeEvent(hello=self._node.hello()))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._talk(context))
                async for command in commands:
                    self._num_taken += 1
                    self._take(command)
                    self._work.set()
                raise ConnectionError("the router ended its stream")
        except* ConnectionError as lost:
            reason = str(lost.exceptions[0])
        finally:
            self._node.sessions.remove(self)
        await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    def _take(self, command: Any) -> None:
        match command.WhichOneof("command"):
            case "prefill":
                lease = command.prefill.lease_number
                request = self._start(command.prefill.sequence, lease, runnable=lease == 0)
                self._by_lease[lease] = request.key
            case "accepted":
                self._accept(command.accepted.lease_number)
            case "decode":
                self._node.num_introductions += bool(command.decode.exports)
                request = self._start(command.decode.sequence, command.decode.lease.number, runnable=True)
                if request.key in self.active:
                    self._unsaid.accepted.append(node_pb2.Accepted(request_id=request.request_id, attempt=request.attempt))
            case "cancel":
                self._cancel(command.cancel)
            case "flush":
                self._flush(command.flush.number)
            case "check":
                self._check(command.check)

    def _start(self, message: node_pb2.SequenceRequest, lease: int, runnable: bool) -> SequenceRequest:
        request = sequence_from_message(message)
        self._node.received.append(request)
        self._node.leases.append(lease)
        if self._node.faults.refuse is not None:
            self.fail(request.key, self._node.faults.refuse)
        elif self._node.faults.unreachable and lease and self._node.role == "decode":
            self.fail(request.key, NodeLost("prefill-0 has not answered the Pull", stage="pull", cause="handshake"))
        elif not self._node.faults.silent and not self._node.faults.forget:
            self.active[request.key] = EchoSequence(request, len(request.emitted_ids), runnable)
        return request

    def _accept(self, lease: int) -> None:
        key = self._by_lease.get(lease)
        if self._node.faults.lose_accepted:
            self._node.faults.lose_accepted = False
        elif key in self.active:
            self.active[key].runnable = True

    def fail(self, key: tuple[str, int], error: BatonError) -> None:
        """Say that an attempt has failed, with the next event."""
        code = grpc.StatusCode[error.status].value[0]
        detail = error_to_message(error)
        self._unsaid.errors.append(node_pb2.SequenceError(request_id=key[0], attempt=key[1], error=detail, code=code))

    def _flush(self, number: int) -> None:
        self._node.flushes.append(number)
        if self._node.faults.die_at_flush:
            raise ConnectionError("died on purpose")
        if not self._node.faults.silent:
            self._unsaid.flushed.append(node_pb2.CacheFlushed(number=number, blocks=self._node.cached_blocks))
            self._node.cached_blocks = 0

    def _check(self, message: node_pb2.Check) -> None:
        key = (message.request_id, message.attempt)
        self._node.checked.append(key)
        if (sequence := self.active.get(key)) is not None:
            self._unsaid.known.append(node_pb2.Known(request_id=key[0], attempt=key[1], next_index=sequence.next_index))
        elif not self._node.faults.silent:
            self.fail(key, Unavailable("there is no such attempt here", cause="unknown_attempt", node=self._node.name))

    def _cancel(self, message: node_pb2.Cancel) -> None:
        self._node.cancelled.append((message.request_id, message.attempt))
        for key in [key for key in self.active if key[0] == message.request_id and key[1] <= message.attempt]:
            del self.active[key]

    async def _talk(self, context: Context) -> None:
        while True:
            self._step()
            if not self._node.faults.mute:
                self._unsaid.load.CopyFrom(self._node.load())
                if not self._node.faults.unrefined:
                    self._unsaid.load.taken = self._num_taken
                event, self._unsaid = self._unsaid, node_pb2.NodeEvent()
                await context.write(event)
            await asyncio.sleep(self._node.step_s)
            if self._node.faults.quiet or not any(sequence.runnable for sequence in self.active.values()):
                await self._rest()

    async def _unmuted(self) -> None:
        while self._node.faults.mute:  # noqa: ASYNC110 - a fault is a plain value, nobody says when it ends
            await asyncio.sleep(0.01)

    async def _rest(self) -> None:
        self._work.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._node.beat_s):
                await self._work.wait()

    def _step(self) -> None:
        if self._node.faults.quiet or self._node.faults.mute:
            return
        for key, sequence in tuple(self.active.items()):
            if sequence.runnable and self._survives(sequence):
                event = self._next(sequence)
                self._say(sequence, event)
                if event.finish_reason is not None or self._node.role == "prefill":
                    del self.active[key]

    def _survives(self, sequence: EchoSequence) -> bool:
        faults = self._node.faults
        if faults.deadly or faults.die_at == sequence.next_index:
            faults.die_at = None
            raise ConnectionError("died on purpose")
        if faults.fail_at is not None and faults.fail_at[0] == sequence.next_index:
            error, faults.fail_at = faults.fail_at[1], None
            del self.active[sequence.request.key]
            self.fail(sequence.request.key, error)
            return False
        return True

    def _next(self, sequence: EchoSequence) -> TokenEvent:
        request, index = sequence.request, sequence.next_index
        sequence.next_index += 1
        token_id = echo_id(request, index)
        if index == self._node.faults.lie_at:
            self._node.faults.lie_at = None
            token_id += 1
        wanted = request.sampling.num_logprobs
        top = ((token_id, ECHO_LOGPROB),) if wanted else ()
        return TokenEvent(
            request_id=request.request_id,
            attempt=request.attempt,
            output_index=index,
            token_ids=(token_id,),
            logprobs=() if wanted is None else (TokenLogprob(token_id, ECHO_LOGPROB, top),),
            finish_reason=request.sampling.finish(index + 1, token_id),
            cached_tokens=0 if self._node.role == "prefill" else None,
        )

    def _say(self, sequence: EchoSequence, event: TokenEvent) -> None:
        if event.output_index == self._node.faults.lose_at:
            self._node.faults.lose_at = None
            return
        said = [event]
        if self._node.faults.stutter:
            sequence.first = sequence.first or event
            said = [sequence.first, event, event]
        for item in said:
            self._put(item)

    def _put(self, event: TokenEvent) -> None:
        if event.logprobs or event.finish_reason is not None or event.cached_tokens is not None:
            self._unsaid.tokens.append(token_event_to_message(event))
        else:
            drawn = Drawn([event.request_id], [event.attempt], [event.output_index], list(event.token_ids))
            self._unsaid.drawn.MergeFrom(drawn_to_message(drawn))


class PrefillService(node_pb2_grpc.PrefillNodeServicer):
    """baton.v1.PrefillNode of an echo node."""

    def __init__(self, node: EchoNode) -> None:
        self._node = node

    async def Control(self, commands: AsyncIterator[node_pb2.PrefillCommand], context: Context) -> None:
        """One router's stream."""
        await Session(self._node).run(commands, context)


class DecodeService(node_pb2_grpc.DecodeNodeServicer):
    """baton.v1.DecodeNode of an echo node."""

    def __init__(self, node: EchoNode) -> None:
        self._node = node

    async def Control(self, commands: AsyncIterator[node_pb2.DecodeCommand], context: Context) -> None:
        """One router's stream."""
        await Session(self._node).run(commands, context)
