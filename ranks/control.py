"""The router's control stream as seen from a group's leader, the same for both roles: hello, commands in, events out, beats.

A gRPC door: knows the messages of node.proto; what commands mean is the role's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

import grpc

from baton import wire
from baton.config import PROTOCOL_VERSION, MembershipConfig
from baton.errors import BatonError, Incompatible, InvalidRequest, Unavailable
from baton.rpc import abort
from baton.v1 import node_pb2
from kv_transfer.server import export_message, layout_message
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.session import GroupLoad, Key, Outbox, PullFacts, Session
from ranks.silence import Silence, beats_in

log = logging.getLogger(__name__)

HELLO_S = 10.0
LAST_WORD_S = 1.0
INCARNATION_BYTES = 16
LOOKS_PER_BEAT = 2  # how often a router's silence is looked at


class Sessions(Protocol):
    """Who is told of streams (see ranks.desk.Desk)."""

    def attach(self, session: Session) -> None:
        """A router's stream has begun. Raises BatonError if none is welcome any more."""

    def detach(self, session: Session) -> None:
        """A router's stream is over."""


class Leader(Protocol):
    """What a stream needs of the leader it talks to."""

    @property
    def desk(self) -> Sessions:
        """Who asked for what."""

    @property
    def drive(self) -> Drive:
        """What steps it."""

    @property
    def membership(self) -> MembershipConfig:
        """How often to beat, and how long a router may be silent."""

    def hello(self) -> GroupHello:
        """Who this group is."""

    def load(self) -> GroupLoad:
        """What it carries now."""


Command = TypeVar("Command", node_pb2.PrefillCommand, node_pb2.DecodeCommand)
Take = Callable[[Session, Command], None]
Context = grpc.aio.ServicerContext  # of any method: only write and abort are used


async def serve_control(
    commands: AsyncIterator[Command],
    context: Context,  # type: ignore[type-arg]
    leader: Leader,
    take: Take[Command],
) -> None:
    """One router's stream until either side ends it. `take` handles a command; a command it refuses ends the stream.

    The router may also end it by silence (router_gone_s without a command), or by not reading: what is written is not taken for
    dead_s, in which it has not heard a beat and so has given this group up, or too much is unread (see Session). However the stream
    ends, the session is detached before anything else is awaited, and with it goes all that the router asked for.
    Writes instead of yielding: a stream that breaks during a write must detach now, not when its generator is collected.
    """
    try:
        session = Session(await _greeted(commands))
        leader.desk.attach(session)
    except BatonError as error:
        await abort(context, error)
    parts = (
        asyncio.create_task(_write_events(session, context, leader)),
        asyncio.create_task(_watch(session, leader.membership)),
        asyncio.create_task(_read(commands, session, take)),
    )
    try:
        await asyncio.wait(parts[:2], return_when=asyncio.FIRST_COMPLETED)
    finally:
        session.close()
        leader.desk.detach(session)
        for part in parts:
            part.cancel()
        outcomes = await asyncio.gather(*parts, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BatonError):
            await _last_word(context, outcome)
            return
        if isinstance(outcome, Exception):
            raise outcome


async def _read(commands: AsyncIterator[Command], session: Session, take: Take[Command]) -> None:
    try:
        async for command in commands:
            session.num_taken += 1
            take(session, command)
    finally:
        session.close()


async def _write_events(session: Session, context: Context, leader: Leader) -> None:  # type: ignore[type-arg]
    await _write(session, context, node_pb2.NodeEvent(hello=hello_message(leader.hello()), load=load_message(leader.load(), 0, 0)))
    beat = 0
    while not session.closed or len(session.outbox):
        outbox = await session.take(leader.membership.beat_s)
        beat += 1
        leader.drive.poke()  # sequences that a backlog had held up may go on
        await _write(session, context, event_message(outbox, load_message(leader.load(), beat, session.num_taken)))


async def _write(session: Session, context: Context, event: node_pb2.NodeEvent) -> None:  # type: ignore[type-arg]
    session.writing = True
    await context.write(event)
    session.writing = False
    session.num_written += 1


async def _watch(session: Session, membership: MembershipConfig) -> None:
    """Raises the reason for which this node ends the stream, if there comes to be one."""
    look_s = membership.beat_s / LOOKS_PER_BEAT
    gone_s, dead_s = membership.router_gone_s, membership.dead_s
    unheard, unread = Silence(beats_in(gone_s, look_s)), Silence(beats_in(dead_s, look_s))
    while True:
        taken, written = session.num_taken, session.num_written
        await session.until_broken(look_s)
        if unheard.beat(session.num_taken > taken):
            raise Unavailable(f"the router has said nothing for {gone_s:g} s: it counts as gone", cause="router_gone")
        if unread.beat(not session.writing or session.num_written > written):
            raise Unavailable(f"the router has read nothing for {dead_s:g} s: it counts as gone", cause="router_gone")


async def _last_word(context: Context, error: BatonError) -> None:  # type: ignore[type-arg]
    """Say why the stream ends, but not to somebody who does not read: behind what is unread, a status would wait for ever."""
    log.warning("a router's stream ends: %s", error.message)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORD_S):
            await abort(context, error)


async def _greeted(commands: AsyncIterator[node_pb2.PrefillCommand] | AsyncIterator[node_pb2.DecodeCommand]) -> bytes:
    """The incarnation of the router that says hello. Raises InvalidRequest if none does within HELLO_S."""
    try:
        async with asyncio.timeout(HELLO_S):
            return _router_incarnation(await anext(commands))
    except (TimeoutError, StopAsyncIteration) as error:
        raise InvalidRequest(f"no hello within {HELLO_S} s of opening the control stream") from error


def _router_incarnation(first: node_pb2.PrefillCommand | node_pb2.DecodeCommand) -> bytes:
    if first.WhichOneof("command") != "hello":
        raise InvalidRequest("the first command on a control stream must be hello")
    if first.hello.protocol_version != PROTOCOL_VERSION:
        raise Incompatible(f"the router speaks protocol {first.hello.protocol_version}, this node {PROTOCOL_VERSION}; update the older one")
    if len(first.hello.router_incarnation) != INCARNATION_BYTES:
        raise InvalidRequest(f"a router's incarnation has {INCARNATION_BYTES} bytes, not {len(first.hello.router_incarnation)}")
    return first.hello.router_incarnation


def event_message(outbox: Outbox, load: node_pb2.Load) -> node_pb2.NodeEvent:
    """One step's events as one message."""
    return node_pb2.NodeEvent(
        tokens=wire.tokens_to_messages(outbox.tokens),
        drawn=wire.drawn_to_message(outbox.drawn) if len(outbox.drawn) else None,
        accepted=[node_pb2.Accepted(request_id=request_id, attempt=attempt) for request_id, attempt in outbox.accepted],
        errors=[_error_message(key, error) for key, error in outbox.errors],
        pulls=[_pull_message(facts) for facts in outbox.pulls],
        flushed=[node_pb2.CacheFlushed(number=number, blocks=blocks) for number, blocks in outbox.flushed],
        known=[node_pb2.Known(request_id=name, attempt=attempt, next_index=index) for name, attempt, index in outbox.known],
        load=load,
    )


def hello_message(hello: GroupHello) -> node_pb2.NodeHello:
    """A group's introduction."""
    return node_pb2.NodeHello(
        protocol_version=PROTOCOL_VERSION,
        node=hello.node,
        group=hello.group,
        incarnation=hello.incarnation,
        model_fingerprint=hello.model_fingerprint,
        dtype=hello.dtype,
        quantization=hello.quantization,
        max_model_len=hello.max_model_len,
        layout=layout_message(hello.layout),
        ranks=[node_pb2.RankInfo(rank=rank.rank, pid=rank.pid, host=rank.host) for rank in hello.ranks],
        transfer_address=hello.transfer_address,
        exports=[export_message(export) for export in hello.exports],
    )


def load_message(load: GroupLoad, beat: int, num_taken: int) -> node_pb2.Load:
    """A group's load with the number of the beat it goes out with, and of the commands that it takes into account."""
    return node_pb2.Load(
        beat=beat,
        waiting_sequences=load.waiting_sequences,
        running_sequences=load.running_sequences,
        waiting_tokens=load.waiting_tokens,
        blocks=wire.counts_to_message(load.blocks),
        open_leases=load.open_leases,
        open_pulls=load.open_pulls,
        steps=load.steps,
        step_seconds=load.step_seconds,
        taken=num_taken,
    )


def _error_message(key: Key, error: BatonError) -> node_pb2.SequenceError:
    code = grpc.StatusCode[error.status].value[0]
    return node_pb2.SequenceError(request_id=key[0], attempt=key[1], error=wire.error_to_message(error), code=code)


def _pull_message(facts: PullFacts) -> node_pb2.PullReport:
    return node_pb2.PullReport(
        request_id=facts.key[0],
        attempt=facts.key[1],
        blocks_pulled=facts.blocks_pulled,
        blocks_matched=facts.blocks_matched,
        bytes_pulled=facts.bytes_pulled,
        seconds=facts.seconds,
        exposed_s=facts.exposed_s,
        transport=facts.transport,
    )
