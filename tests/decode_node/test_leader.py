"""A decode leader over real engines and real gRPC: no sequence waits for nothing, none ends in silence, no block is lost."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
import torch

from baton.deadline import Deadline
from baton.engine.batch import Batch
from baton.engine.runner import StepOutcome
from baton.errors import BatonError, Cancelled, InvalidRequest
from baton.rpc import bind, make_server
from decode_node.intake import PullSource
from kv_transfer.transport import Export
from ranks.drive import Drive
from ranks.facts import RankCounts, ReadOrder
from ranks.service import Peer, add_rank_service
from ranks.session import Session
from tests.relay.inprocess import PATIENCE_S, InProcess, Stream, ask, eventually
from tests.tiny_models import make_tiny

TCP = {"transfer": {"transport": "tcp"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def prefill(model: Path) -> AsyncIterator[InProcess]:
    rank = await InProcess(model, "prefill", 32, max_model_len=192, **TCP).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle prefill node")
    await rank.stop()


@pytest.fixture
async def decode(model: Path) -> AsyncIterator[InProcess]:
    rank = await InProcess(model, "decode", 12, max_model_len=192, **TCP).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle decode node")
    await rank.stop()


class Follower:
    """A second rank of the decode group, as far as its leader sees it: a RankControl server whose reads wait, then fail or end."""

    def __init__(self, error: BatonError | None = None) -> None:
        self.reading = 0
        self.orders: list[ReadOrder] = []
        self.ready = asyncio.Event()
        self.drive = Drive(self._step, self._wake_others, None)
        self._error = error
        self._server: grpc.aio.Server | None = None

    async def start(self) -> Peer:
        self._server = make_server()
        add_rank_service(self._server, self)
        port = bind(self._server, "127.0.0.1", 0)
        await self._server.start()
        return Peer("decode-0", 1, f"127.0.0.1:{port}")

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(None)

    async def _step(self, batch: Batch | None) -> StepOutcome:
        raise AssertionError("nothing to step")

    async def _wake_others(self, epoch: int) -> None:
        raise AssertionError("nobody to wake")

    def wake(self, epoch: int) -> None:
        """Nothing to step."""

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        return "tcp"

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        self.reading += 1
        self.orders.append(order)
        try:
            await self.ready.wait()
        finally:
            self.reading -= 1
        if self._error:
            raise self._error
        return 0

    def export(self) -> NoReturn:
        raise InvalidRequest("a follower of a decode group")

    def counts(self) -> RankCounts:
        raise AssertionError("nobody asks")


class Relay:
    """What the router does for one request after another, on one stream to each node."""

    def __init__(self, prefill: Stream, decode: Stream) -> None:
        self.prefill, self.decode = prefill, decode
        self._lease = 0

    @classmethod
    async def connect(cls, prefill: InProcess, decode: InProcess) -> "Relay":
        return cls(await prefill.stream(), await decode.stream())

    async def send(self, request_id: str, prompt_len: int, **sampling: int) -> None:
        """Both stages, as the router does it; decode is always wanted."""
        self._lease += 1
        source = self.prefill.hello
        assert source
        request = ask(request_id, prompt_len, **sampling)
        await self.decode.decode(request, source, self._lease)
        await self.prefill.prefill(request, self._lease)
        await self.prefill.accept(self._lease)


async def test_a_sequence_crosses_and_finishes(prefill: InProcess, decode: InProcess) -> None:
    relay = await Relay.connect(prefill, decode)
    await relay.send("a", 50, max_tokens=6)
    await eventually(lambda: relay.decode.finished("a"), "the last token")
    assert sorted(relay.decode.ids("a")) == list(range(6))
    assert relay.prefill.ids("a")[0] == relay.decode.ids("a")[0]
    assert not relay.decode.errors and not relay.prefill.errors


async def test_flushing_frees_what_nobody_uses_on_both_sides(prefill: InProcess, decode: InProcess) -> None:
    """The prompt of a sequence that is being generated stays where it is; one that has ended is cached, and then forgotten."""
    relay = await Relay.connect(prefill, decode)
    decode.host.pause()
    await relay.send("a", 50, max_tokens=6)
    await eventually(lambda: decode.host.in_step, "a step")
    assert await relay.decode.flush(1) == 0
    decode.host.resume()
    await eventually(lambda: relay.decode.finished("a") and prefill.idle, "the last token")
    assert await relay.prefill.flush(2) == await relay.decode.flush(3) == 3
    for rank in (prefill, decode):
        assert (rank.life.counts().cached, rank.life.counts().free) == (0, rank.host.num_blocks)
        rank.leader.pool.check()
    await relay.send("again", 50, max_tokens=6)
    await eventually(lambda: relay.decode.finished("again"), "the same, computed again")
    assert relay.decode.ids("again") == relay.decode.ids("a")
    assert [event.cached_tokens for event in relay.prefill.tokens] == [0, 0]


async def test_blocks_freed_by_the_end_of_a_step_let_the_next_one_in(prefill: InProcess, decode: InProcess) -> None:
    """The first is cancelled during a step: its blocks are free only after it, and nothing else happens then."""
    relay = await Relay.connect(prefill, decode)
    decode.host.pause()
    await relay.send("first", 120, max_tokens=50)
    await eventually(lambda: decode.host.in_step, "a step of the first")
    await relay.send("second", 120, max_tokens=4, seed=9)
    await eventually(lambda: decode.leader.scheduler.load().waiting == 1, "a queue")
    await relay.decode.cancel("first")
    await eventually(lambda: len(decode.leader.desk) == 1, "the cancel")
    await relay.prefill.cancel("first")
    decode.host.resume()
    await eventually(lambda: relay.decode.finished("second"), "room for the second")


async def test_a_read_that_was_cut_off_elsewhere_is_told_to_the_router(prefill: InProcess, model: Path) -> None:
    follower = Follower(Cancelled("the follower is going", stage="pull"))
    decode = await InProcess(model, "decode", 12, max_model_len=192, **TCP).start(await follower.start())
    relay = await Relay.connect(prefill, decode)
    await relay.send("a", 50)
    await eventually(lambda: follower.reading == 1, "a read")
    follower.ready.set()
    await eventually(lambda: ("a", 1) in relay.decode.errors, "the router's word")
    assert relay.decode.errors["a", 1].error.retryable
    await eventually(lambda: decode.idle, "an idle node")
    await relay.prefill.cancel("a")
    await follower.stop()
    await decode.stop()


@pytest.mark.parametrize("given_up", [False, True])
async def test_a_rank_that_does_not_say_how_its_read_ended_ends_the_node(prefill: InProcess, model: Path, given_up: bool) -> None:
    """It may be dead, or only out of reach and still writing: its blocks are given to nobody, whatever happens to the sequence."""
    follower = Follower()
    decode = await InProcess(model, "decode", 12, max_model_len=192, **TCP).start(await follower.start())
    relay = await Relay.connect(prefill, decode)
    await relay.send("a", 50)
    await eventually(lambda: follower.reading == 1, "a read")
    if given_up:
        await relay.decode.cancel("a")
        await eventually(lambda: decode.life.counts().quarantined == 4, "quarantine")
    await follower.stop()
    await asyncio.wait_for(decode.life.failed.wait(), PATIENCE_S)
    assert decode.life.counts().quarantined == 4
    assert given_up or relay.decode.errors["a", 1].error.retryable
    await eventually(lambda: relay.decode.ended, "the end of the stream")
    await relay.prefill.cancel("a")
    await decode.stop()


async def test_blocks_of_a_cancelled_pull_are_set_aside_until_every_read_has_ended(prefill: InProcess, model: Path) -> None:
    follower = Follower()
    decode = await InProcess(model, "decode", 12, max_model_len=192, **TCP).start(await follower.start())
    relay = await Relay.connect(prefill, decode)
    await relay.send("a", 50)
    await eventually(lambda: follower.reading == 1, "a read")
    await relay.decode.cancel("a")
    await eventually(lambda: decode.life.counts().quarantined == 4, "quarantine")
    closing = asyncio.create_task(decode.node.close(None))
    await asyncio.sleep(0.05)
    assert not closing.done() and decode.life.counts().quarantined == 4, "a second cancel must not cut the wait short"
    follower.ready.set()
    await closing
    assert decode.idle
    await relay.prefill.cancel("a")
    await follower.stop()
    await decode.stop()


async def test_a_long_prompt_is_read_piece_by_piece(prefill: InProcess, model: Path) -> None:
    """The time limit is for one read, so one read is bounded; blocks are bound when their bytes are about to arrive."""
    follower = Follower()
    decode = await InProcess(model, "decode", 12, max_model_len=192, **TCP).start(await follower.start())
    decode.leader.intake.max_read_blocks = 3
    relay = await Relay.connect(prefill, decode)
    await relay.send("a", 120, max_tokens=4)
    await eventually(lambda: len(follower.orders) == 1, "the first read")
    assert decode.life.counts().held == 3
    follower.ready.set()
    await eventually(lambda: relay.decode.finished("a"), "the last token")
    assert [len(order.target_blocks) for order in follower.orders] == [3, 3, 2]
    assert len({block for order in follower.orders for block in order.target_blocks}) == 8
    await eventually(lambda: decode.idle, "an idle node")
    await follower.stop()
    await decode.stop()


async def test_a_later_attempt_takes_the_place_of_the_earlier(prefill: InProcess, decode: InProcess) -> None:
    relay = await Relay.connect(prefill, decode)
    decode.host.pause()
    await relay.send("a", 50, attempt=1)
    await eventually(lambda: decode.host.in_step, "a step")
    await relay.send("a", 50, attempt=2)
    decode.host.resume()
    await eventually(lambda: relay.decode.finished("a"), "the last token")
    assert {event.attempt for event in relay.decode.tokens if event.output_index > 0} == {2}


async def test_prefill_gone_during_the_pull_is_told(model: Path, decode: InProcess) -> None:
    prefill = await InProcess(model, "prefill", 32, max_model_len=192, **TCP).start()
    relay = await Relay.connect(prefill, decode)
    prefill.host.pause()
    await relay.send("a", 50)
    await eventually(lambda: prefill.host.in_step and decode.leader.intake.num_open == 1, "a pull")
    await prefill.stop()
    await eventually(lambda: ("a", 1) in relay.decode.errors, "the router's word")
    assert relay.decode.errors["a", 1].error.retryable


async def test_a_router_that_is_lost_ends_all_its_sequences_before_anybody_is_let_in(decode: InProcess) -> None:
    """Else those that wait are let in one by one, and looked at all over again for each that ends: no loop bears that with a full line."""
    leader = decode.leader
    lost, other = Session(b"l" * 16), Session(b"o" * 16)
    for session in (lost, other):
        leader.desk.attach(session)
    nowhere = PullSource("127.0.0.1:1", b"i" * 16, 1, ())
    for i in range(4):
        leader.decode(lost, ask(f"lost-{i}", 120, max_tokens=50), nowhere, 60.0)
    leader.decode(other, ask("other", 120, max_tokens=50), nowhere, 60.0)
    leader.desk.detach(lost)
    assert lost.outbox.accepted == [("lost-0", 1)]
    await eventually(lambda: other.outbox.accepted == [("other", 1)], "room for the other router's")
    leader.desk.detach(other)


async def test_a_node_that_has_closed_takes_nothing_more(prefill: InProcess, decode: InProcess) -> None:
    relay = await Relay.connect(prefill, decode)
    decode.host.pause()
    await relay.send("a", 50)
    await eventually(lambda: decode.host.in_step, "a step")
    await decode.node.close(None)
    await eventually(lambda: relay.decode.ended, "the end of the stream")
    assert relay.decode.errors["a", 1].error.cause == "node_lost"
    decode.host.resume()
    await relay.prefill.cancel("a")
