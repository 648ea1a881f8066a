"""The router's control stream as seen from a group's leader, the same for both roles: hello, commands in, events out, beats.

A gRPC door: knows the messages of node.proto; what commands mean is the role's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

import grpc

from baton import wire
from baton.config import PROTOCOL_VERSION
from baton.errors import BatonError, Incompatible, InvalidRequest
from baton.rpc import abort
from baton.v1 import node_pb2
from kv_transfer.server import export_message, layout_message
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.session import GroupLoad, Key, Outbox, PullFacts, Session

BEAT_S = 1.0
HELLO_S = 10.0


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

    def hello(self) -> GroupHello:
        """Who this group is."""

    def load(self) -> GroupLoad:
        """What it carries now."""


Command = TypeVar("Command", node_pb2.PrefillCommand, node_pb2.DecodeCommand)
Take = Callable[[Session, Command], None]


async def serve_control(
    commands: AsyncIterator[Command],
    context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    leader: Leader,
    take: Take[Command],
) -> None:
    """One router's stream until either side ends it. `take` handles a command; a command it refuses ends the stream.

    Writes instead of yielding: a stream that breaks during a write must detach now, not when its generator is collected.
    """
    try:
        session = Session(await _greeted(commands))
        leader.desk.attach(session)
    except BatonError as error:
        await abort(context, error)
    reader = asyncio.create_task(_read(commands, session, take))
    try:
        await context.write(node_pb2.NodeEvent(hello=hello_message(leader.hello()), load=load_message(leader.load(), 0)))
        await _write_events(session, context, leader)
        if reader.done():  # else this node ends the stream, and nothing more is taken from it
            reader.result()
    except BatonError as error:
        await abort(context, error)
    finally:
        reader.cancel()
        session.close()
        leader.desk.detach(session)


async def _read(commands: AsyncIterator[Command], session: Session, take: Take[Command]) -> None:
    try:
        async for command in commands:
            take(session, command)
    finally:
        session.close()


async def _write_events(session: Session, context: grpc.aio.ServicerContext, leader: Leader) -> None:  # type: ignore[type-arg]
    beat = 0
    while not session.closed or len(session.outbox):
        outbox = await session.take(BEAT_S)
        beat += 1
        leader.drive.poke()  # sequences that a backlog had held up may go on
        await context.write(event_message(outbox, load_message(leader.load(), beat)))


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
    return first.hello.router_incarnation


def event_message(outbox: Outbox, load: node_pb2.Load) -> node_pb2.NodeEvent:
    """One step's events as one message."""
    return node_pb2.NodeEvent(
        tokens=wire.tokens_to_messages(outbox.tokens),
        accepted=[node_pb2.Accepted(request_id=request_id, attempt=attempt) for request_id, attempt in outbox.accepted],
        errors=[_error_message(key, error) for key, error in outbox.errors],
        pulls=[_pull_message(facts) for facts in outbox.pulls],
        flushed=[node_pb2.CacheFlushed(number=number, blocks=blocks) for number, blocks in outbox.flushed],
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


def load_message(load: GroupLoad, beat: int) -> node_pb2.Load:
    """A group's load with the number of the beat it goes out with."""
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
