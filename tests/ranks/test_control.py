"""A control stream over real gRPC in bad days: a router that does not read, breaks off, never says hello, or outlives the node."""

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from baton.config import PROTOCOL_VERSION
from baton.engine.batch import Batch, Sampled
from baton.errors import BatonError, Incompatible, NodeLost
from baton.request import BlockCounts, TokenEvent
from baton.rpc import bind, make_server, open_channel, to_error
from baton.v1 import node_pb2, node_pb2_grpc
from kv_transfer.client import layout_of
from kv_transfer.layout import KVLayout
from ranks.control import hello_message, serve_control
from ranks.desk import Desk
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.session import MAX_BACKLOG, GroupLoad, Key, Session
from tests.relay.inprocess import Stream, eventually

LAYOUT = KVLayout(("block", "layer", "part", "head", "slot", "dim"), 4, 4, 0, 1, (4, 4), 0, 1, "float32", 1, 1)


class Group(node_pb2_grpc.PrefillNodeServicer):
    """A leader without a model: keeps what it was asked, and what its planner was free to run at each turn."""

    def __init__(self) -> None:
        self.desk = Desk[int]("prefill", "group", self._end)
        self.drive = Drive(self._never, self._wake, self)
        self.session: Session | None = None
        self.blocked: list[int] = []
        self.ended: list[tuple[Key, BatonError]] = []

    async def Control(self, commands: AsyncIterator[Any], context: Any) -> None:
        """See proto."""
        await serve_control(commands, context, self, self._take)

    def hello(self) -> GroupHello:
        """See Leader."""
        return GroupHello("group", 0, b"i" * 16, "model", "float32", "", 64, LAYOUT, ())

    def load(self) -> GroupLoad:
        """See Leader."""
        return GroupLoad(0, 0, 0, BlockCounts(4, 4, 0, 0, 0), 0, 0, 0, 0.0)

    def plan(self) -> Batch:
        """See Planner."""
        self.blocked.append(len(self.desk.backlogged()))
        return Batch.build([])

    def apply(self, sampled: Sampled) -> None:
        """See Planner."""

    def _take(self, session: Session, command: node_pb2.PrefillCommand) -> None:
        if command.WhichOneof("command") == "prefill":
            self.session = session
            sequence = command.prefill.sequence
            self.desk.open(session, (sequence.request_id, sequence.attempt), 60.0, 0)

    def _end(self, key: Key, error: BatonError) -> None:
        self.desk.forget(key)
        self.ended.append((key, error))

    async def _never(self, batch: Batch | None) -> Any:
        raise AssertionError("there is no work")

    async def _wake(self, epoch: int) -> None:
        """Nobody else is there."""


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    made = Group()
    stepping = asyncio.create_task(made.drive.run())
    yield made
    made.drive.close()
    await stepping


@pytest.fixture
async def address(group: Group) -> AsyncIterator[str]:
    server = make_server()
    node_pb2_grpc.add_PrefillNodeServicer_to_server(group, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def router(address: str) -> AsyncIterator[Stream]:
    stream = Stream("prefill", address)
    await stream.open()
    yield stream
    await stream.close()


async def asked(group: Group, router: Stream) -> Session:
    """One request is on the desk; its session."""
    await router.say(prefill=node_pb2.PrefillRequest(sequence=node_pb2.SequenceRequest(request_id="a", attempt=1)))
    await eventually(lambda: len(group.desk) == 1, "the request")
    assert group.session
    return group.session


async def test_sequences_of_a_router_that_reads_again_go_on(group: Group, router: Stream) -> None:
    """Nothing but the drained outbox says so: without a poke the drive would sleep on."""
    session = await asked(group, router)
    session.outbox.tokens += [TokenEvent("a", 1, i, (7,)) for i in range(MAX_BACKLOG + 1)]
    group.drive.poke()
    await eventually(lambda: group.blocked[-1:] == [1], "a turn that leaves the sequence out")
    session.flush()
    await eventually(lambda: len(router.tokens) > MAX_BACKLOG, "the backlog")
    await eventually(lambda: group.blocked[-1] == 0, "a turn that may run the sequence")


async def test_a_router_that_breaks_off_while_it_is_written_to_is_forgotten_now(group: Group, address: str) -> None:
    """Not whenever the garbage collector comes by: its sequences hold blocks."""
    channel = open_channel(address)
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    await call.write(node_pb2.PrefillCommand(hello=node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=b"r" * 16)))
    sequence = node_pb2.SequenceRequest(request_id="a", attempt=1)
    await call.write(node_pb2.PrefillCommand(prefill=node_pb2.PrefillRequest(sequence=sequence)))
    await eventually(lambda: group.session is not None, "the request")
    session = group.session
    assert session
    gc.disable()
    try:
        ids = tuple(range(100_000))
        for i in range(200):  # far more than flow control lets through to somebody who does not read
            session.outbox.tokens.append(TokenEvent("a", 1, i, ids))
            session.flush()
            await asyncio.sleep(0)
            if len(session.outbox.tokens) > 3:
                break
        assert len(session.outbox), "the stream is stuck in a write"
        call.cancel()
        await eventually(lambda: [key for key, _ in group.ended] == [("a", 1)], "the end of what the router had asked for")
    finally:
        gc.enable()
    await channel.close(None)


async def test_a_group_that_closes_ends_the_stream_after_its_last_word(group: Group, router: Stream) -> None:
    await asked(group, router)
    why = NodeLost("a step failed", stage="prefill", node="group")
    assert group.session
    group.desk.refuse(group.session, ("a", 1), why)
    group.desk.close(why)
    await eventually(lambda: router.ended, "the end of the stream")
    assert ("a", 1) in router.errors
    with pytest.raises(NodeLost):
        group.desk.check_open()


async def test_a_router_of_another_protocol_is_told_both_versions(group: Group, address: str) -> None:
    async with open_channel(address) as channel:
        call = node_pb2_grpc.PrefillNodeStub(channel).Control()
        await call.write(node_pb2.PrefillCommand(hello=node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION + 1)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    error = to_error(caught.value)
    assert isinstance(error, Incompatible)
    assert f"speaks protocol {PROTOCOL_VERSION + 1}, this node {PROTOCOL_VERSION}" in error.message


def test_a_hello_says_all_that_peers_compare(group: Group) -> None:
    said = hello_message(replace(group.hello(), quantization="w8a8"))
    assert (said.protocol_version, said.model_fingerprint, said.dtype, said.quantization) == (PROTOCOL_VERSION, "model", "float32", "w8a8")
    assert layout_of(said.layout) == LAYOUT


async def test_a_stream_that_ends_before_its_hello_is_refused(group: Group, address: str) -> None:
    async with open_channel(address) as channel:
        call = node_pb2_grpc.PrefillNodeStub(channel).Control(iter(()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(group.desk) == 0
