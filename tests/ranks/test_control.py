"""A control stream over real gRPC in bad days: a router that does not read, breaks off, never says hello, or outlives the node."""

import asyncio
import gc
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from baton.config import PROTOCOL_VERSION, MembershipConfig
from baton.engine.batch import Batch, Sampled
from baton.errors import BatonError, Incompatible, InvalidRequest, NodeLost
from baton.request import BlockCounts, SequenceRequest, TokenEvent
from baton.rpc import bind, make_server, open_channel, to_error
from baton.v1 import node_pb2, node_pb2_grpc
from baton.wire import sequence_from_message
from kv_transfer.client import layout_of
from kv_transfer.layout import KVLayout
from ranks.control import hello_message, serve_control
from ranks.desk import Desk
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.session import MAX_BACKLOG, MAX_UNREAD, GroupLoad, Key, Session
from tests.relay.inprocess import LOOK_EVERY_S, Stream, eventually

LAYOUT = KVLayout(("block", "layer", "part", "head", "slot", "dim"), 4, 4, 0, 1, (4, 4), 0, 1, "float32", 1, 1)


class Group(node_pb2_grpc.PrefillNodeServicer):
    """A leader without a model: keeps what it was asked, and what its planner was free to run at each turn."""

    def __init__(self, **membership: float) -> None:
        self.membership = MembershipConfig(**membership)
        self.desk = Desk[int]("prefill", "group", self._end, vocab_size=1000)
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

    def tell(self) -> None:
        """See Planner."""

    def _take(self, session: Session, command: node_pb2.PrefillCommand) -> None:
        self.session = session
        match command.WhichOneof("command"):
            case "prefill":
                self._prefill(session, command.prefill.sequence)
            case "cancel":
                self.desk.cancel(session, command.cancel.request_id, command.cancel.attempt, "")
            case "check":
                self.desk.check(session, command.check.request_id, command.check.attempt)

    def _prefill(self, session: Session, message: node_pb2.SequenceRequest) -> None:
        try:
            request: SequenceRequest = sequence_from_message(message)
            deadline = self.desk.admit(session, request, message.time_left_s)
        except BatonError as error:
            self.desk.refuse(session, (message.request_id, message.attempt), error)
            return
        if deadline is not None:
            self.desk.open(session, request, deadline, 0)

    def _end(self, key: Key, error: BatonError) -> None:
        self.desk.forget(key)
        self.ended.append((key, error))

    async def _never(self, batch: Batch | None) -> Any:
        raise AssertionError("there is no work")

    async def _wake(self, epoch: int) -> None:
        """Nobody else is there."""


@asynccontextmanager
async def served(group: Group) -> AsyncIterator[str]:
    """The address on which the group listens, for as long as this lasts."""
    stepping = asyncio.create_task(group.drive.run())
    server = make_server()
    node_pb2_grpc.add_PrefillNodeServicer_to_server(group, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)
    group.drive.close()
    await stepping


@asynccontextmanager
async def router_of(address: str, incarnation: bytes | None = None) -> AsyncIterator[Stream]:
    """A router's stream to the group."""
    stream = Stream("prefill", address, incarnation)
    await stream.open()
    yield stream
    await stream.close()


@pytest.fixture
async def group() -> Group:
    return Group()


@pytest.fixture
async def address(group: Group) -> AsyncIterator[str]:
    async with served(group) as address:
        yield address


@pytest.fixture
async def router(address: str) -> AsyncIterator[Stream]:
    async with router_of(address) as stream:
        yield stream


def request(request_id: str = "a", attempt: int = 1, **fields: Any) -> node_pb2.PrefillRequest:
    """One token, unless told otherwise."""
    sampling = node_pb2.ResolvedSampling(max_tokens=8, top_p=1.0)
    asked = {"prompt_ids": [1, 2, 3], "sampling": sampling, "time_left_s": 60.0, **fields}
    return node_pb2.PrefillRequest(sequence=node_pb2.SequenceRequest(request_id=request_id, attempt=attempt, **asked))


async def asked(group: Group, router: Stream, request_id: str = "a") -> Session:
    """One request more is on the desk; its session."""
    before = len(group.desk)
    await router.say(prefill=request(request_id))
    await eventually(lambda: len(group.desk) == before + 1, "the request")
    assert group.session
    return group.session


async def deaf(address: str, **more: node_pb2.PrefillRequest) -> tuple[grpc.aio.Channel, Any]:
    """A router that says hello, beats, and never reads. Whoever calls closes the channel."""
    channel = open_channel(address)
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    await call.write(node_pb2.PrefillCommand(hello=node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=b"d" * 16)))
    await call.write(node_pb2.PrefillCommand(prefill=request()))
    return channel, call


async def fill(session: Session) -> None:
    """Far more than flow control lets through to somebody who does not read: the stream is stuck in a write then."""
    ids = tuple(range(100_000))
    for i in range(200):
        session.outbox.tokens.append(TokenEvent("a", 1, i, ids))
        session.flush()
        written = session.num_written
        for _ in range(50):
            await asyncio.sleep(LOOK_EVERY_S)
            if session.num_written > written:
                break
        else:
            return
    raise AssertionError("the stream takes whatever comes")


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
    channel, call = await deaf(address)
    await eventually(lambda: group.session is not None, "the request")
    assert group.session
    gc.disable()
    try:
        await fill(group.session)
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


async def refusal(address: str, hello: node_pb2.RouterHello) -> BatonError:
    """What a router that greets like this is told."""
    async with open_channel(address) as channel:
        call = node_pb2_grpc.PrefillNodeStub(channel).Control()
        await call.write(node_pb2.PrefillCommand(hello=hello))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    return to_error(caught.value)


@pytest.mark.parametrize("incarnation", [b"", b"short", b"r" * 17])
async def test_a_router_without_a_proper_incarnation_is_refused(address: str, incarnation: bytes) -> None:
    error = await refusal(address, node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=incarnation))
    assert isinstance(error, InvalidRequest) and "16 bytes" in error.message


async def test_a_router_of_another_protocol_is_told_both_versions(group: Group, address: str) -> None:
    error = await refusal(address, node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION + 1, router_incarnation=b"r" * 16))
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


FAST = {"beat_s": 0.05, "router_gone_s": 0.3, "suspect_beats": 3, "dead_beats": 6}


async def test_a_silent_router_counts_as_gone_and_another_does_not_notice() -> None:
    group = Group(beat_s=0.1, router_gone_s=1.0)
    async with served(group) as address, router_of(address) as silent, router_of(address) as other:
        await asked(group, silent)
        await asked(group, other, "b")
        silent.mute = True
        await eventually(lambda: silent.ended, "the end of its stream")
        assert [key for key, _ in group.ended] == [("a", 1)] and len(group.desk) == 1
        assert "said nothing for 1 s" in silent.status and not other.ended


async def test_a_router_that_beats_but_never_reads_counts_as_gone() -> None:
    """It has not heard this group's beats either, and has long given it up."""
    group = Group(**FAST)
    async with served(group) as address:
        channel, call = await deaf(address)
        await eventually(lambda: group.session is not None, "the request")
        assert group.session
        await fill(group.session)
        beats = 0
        while not group.ended:
            beats += 1
            assert beats < 500, "it is still here"
            await call.write(node_pb2.PrefillCommand(beat=node_pb2.Beat(number=beats)))
            await asyncio.sleep(0.02)
        assert [key for key, _ in group.ended] == [("a", 1)] and not len(group.desk)
        await channel.close(None)


async def test_what_a_router_leaves_unread_is_bounded_whatever_it_asks(group: Group, address: str) -> None:
    """A flood of questions whose answers nobody reads: the stream ends, and memory with it; another router is served all the time."""
    channel, call = await deaf(address)
    await eventually(lambda: group.session is not None, "the request")
    session = group.session
    assert session
    async with router_of(address) as other:
        await fill(session)
        for number in range(MAX_UNREAD + 10):
            group.desk.check(session, "unknown", number)
            assert len(session.outbox) <= MAX_UNREAD
        await eventually(lambda: [key for key, _ in group.ended] == [("a", 1)], "the end of what the router had asked for")
        assert not len(session.outbox)
        await other.check("b")
        await eventually(lambda: ("b", 1) in other.errors, "an answer to another router")
    call.cancel()
    await channel.close(None)


async def test_a_router_that_comes_again_takes_the_place_of_its_earlier_stream(group: Group, address: str) -> None:
    """It knows that the earlier one is broken, long before this end may hear of it."""
    async with router_of(address, b"r" * 16) as earlier:
        await asked(group, earlier)
        async with router_of(address, b"r" * 16) as later:
            await eventually(lambda: earlier.ended, "the end of the earlier stream")
            assert [key for key, _ in group.ended] == [("a", 1)]
            await asked(group, later, "b")
            assert not later.ended


async def test_a_check_is_answered_with_how_far_an_attempt_is(group: Group, router: Stream) -> None:
    session = await asked(group, router)
    group.desk.deliver(TokenEvent("a", 1, 0, (7, 8)))
    await router.check("a", 1)
    await eventually(lambda: bool(router.known), "an answer")
    assert router.known == [("a", 1, 2)]
    assert [event.token_ids for event in router.tokens] == [(7, 8)], "what has been sent by then comes with it or before"
    await router.check("a", 2)
    await eventually(lambda: ("a", 2) in router.errors, "an answer")
    told = router.errors["a", 2].error
    assert told.cause == "unknown_attempt" and told.retryable
    assert not session.closed


@pytest.mark.parametrize(
    "nonsense",
    [
        request(prompt_ids=[]),
        request(prompt_ids=[1, 1000]),
        request(emitted_ids=[2**31 - 1]),
        request(emitted_ids=range(9)),
        request(attempt=0),
        request(time_left_s=math.nan),
        request(time_left_s=-1.0),
        request(time_left_s=math.inf),
        request(sampling=node_pb2.ResolvedSampling(max_tokens=8, top_p=math.nan)),
        request(sampling=node_pb2.ResolvedSampling(max_tokens=8, temperature=-1.0)),
    ],
    ids=lambda made: str(made.sequence)[-40:].replace("\n", " "),
)
async def test_nonsense_is_the_error_of_its_attempt_and_of_nothing_else(
    group: Group, router: Stream, nonsense: node_pb2.PrefillRequest
) -> None:
    await router.say(prefill=nonsense)
    key = (nonsense.sequence.request_id, nonsense.sequence.attempt)
    await eventually(lambda: key in router.errors, "the refusal")
    assert grpc.StatusCode.INVALID_ARGUMENT.value[0] == router.errors[key].code
    await asked(group, router, "sound")


async def test_a_node_says_how_many_commands_its_load_accounts_for(group: Group, router: Stream) -> None:
    await asked(group, router)
    await router.check("a")
    await eventually(lambda: router.taken >= 2, "a message after two commands")
