"""Pulls as their tasks carry them out: one word about each, reads are waited for, and one that has no end costs the node, never a block."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from baton.deadline import Deadline
from baton.engine.blocks import BlockPool
from baton.errors import BatonError, Cancelled, InternalError, NodeLost, Unavailable
from baton.request import Sampling, SequenceRequest
from baton.rpc import open_channel
from decode_node.intake import Intake, PullSource
from decode_node.scheduler import DecodeScheduler
from decode_node.stages import Stage
from kv_transfer.client import PullClient
from kv_transfer.lease import FinalToken
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from ranks.service import Unacknowledged
from ranks.session import Key, PullFacts
from tests.decode_node.scripted_source import QUEUED, RELEASED, ScriptedSource, announcement, final
from tests.relay.inprocess import eventually

KEY = ("a", 1)
NUM_BLOCKS = 16


class Reads:
    """All ranks of a group, as far as reads go: each read ends as the test says."""

    def __init__(self) -> None:
        self.unreachable: BatonError | None = None
        self.orders: list[ReadOrder] = []
        self.under_way: list[asyncio.Future[int]] = []

    async def learn(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        if self.unreachable:
            raise self.unreachable
        return "test"

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        self.orders.append(order)
        self.under_way.append(asyncio.get_running_loop().create_future())
        return await self.under_way[-1]


class Group:
    """A decode group's pool, scheduler and intake, and what its leader would hear."""

    def __init__(self, read_s: float = 30.0, handshake_s: float = 0.3, client: PullClient | None = None) -> None:
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.scheduler = DecodeScheduler(
            self.pool, max_sequences=4, max_waiting=4, reserve_output_tokens=4, max_step_tokens=4, mixed_step_tokens=4, max_model_len=64
        )
        self.reads = Reads()
        self.client = client or PullClient(handshake_s=handshake_s)
        limits = {"read_s": read_s, "block_bytes": 2**26, "vocab_size": 100, "answer_s": 0.05}
        self.intake = Intake(self.scheduler, self.client, self.reads, self, **limits)
        self.heard: list[tuple[str, Key, object]] = []
        self.bug: Exception | None = None

    def pulled(self, key: Key, token: FinalToken, facts: PullFacts) -> None:
        if self.bug:
            raise self.bug
        self.scheduler.start(key, token.event(*key))
        self.heard.append(("pulled", key, facts))

    def pull_failed(self, key: Key, error: BatonError) -> None:
        self.scheduler.cancel(key, quarantine=False)
        self.scheduler.quiesced(key)
        self.heard.append(("failed", key, error))

    def pull_lost(self, key: Key, error: BatonError) -> None:
        self.scheduler.cancel(key, quarantine=True)
        self.heard.append(("lost", key, error))

    def give_up(self) -> None:
        """As the leader does it."""
        self.scheduler.cancel(KEY, quarantine=self.intake.cancel(KEY))

    async def word(self) -> tuple[str, object]:
        """The one word about the pull."""
        await eventually(lambda: bool(self.heard) and not self.intake.num_open, "a word about the pull")
        ((what, key, about),) = self.heard
        assert key == KEY
        return what, about


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    made = Group()
    yield made
    await made.intake.close()
    await made.client.close()


@pytest.fixture
async def source() -> AsyncIterator[tuple[ScriptedSource, str]]:
    servicer = ScriptedSource()
    servicer.script, servicer.last = [QUEUED, announcement(0, 2), announcement(2, 1, final=final())], RELEASED
    yield servicer, await servicer.start()
    await servicer.stop()


def begin(group: Group, address: str, seconds: float = 60.0) -> None:
    """A prompt of three blocks."""
    group.scheduler.add(SequenceRequest(*KEY, tuple(range(10)), Sampling(max_tokens=4)))
    (admitted,) = group.scheduler.admit()
    group.intake.begin(admitted, PullSource(address, b"i" * 16, 1, ()), Deadline.after(seconds))


async def reading(group: Group) -> asyncio.Future[int]:
    await eventually(lambda: bool(group.reads.under_way), "a read")
    return group.reads.under_way[-1]


async def test_blocks_are_read_as_announced_and_reported(group: Group, source: tuple[ScriptedSource, str]) -> None:
    begin(group, source[1])
    (await reading(group)).set_result(70)
    await eventually(lambda: len(group.reads.under_way) == 2, "the second read")
    group.reads.under_way[1].set_result(7)
    what, facts = await group.word()
    assert what == "pulled" and isinstance(facts, PullFacts)
    assert (facts.blocks_pulled, facts.blocks_matched, facts.bytes_pulled, facts.transport) == (3, 0, 77, "test")
    assert [order.source_blocks for order in group.reads.orders] == [(0, 1), (0,)]
    assert source[0].asked == ["open", "release"]
    assert group.scheduler.stage(KEY) is Stage.RUNNING


async def test_however_often_it_is_cancelled_a_read_is_waited_for(group: Group, source: tuple[ScriptedSource, str]) -> None:
    begin(group, source[1])
    under_way = await reading(group)
    group.give_up()
    closing = asyncio.create_task(group.intake.close())
    for _ in range(3):
        await asyncio.sleep(0.01)
        assert group.intake.cancel(KEY), "its blocks may still be written"
    assert not closing.done() and group.pool.counts().quarantined == 2
    under_way.set_result(7)
    await closing
    what, error = await group.word()
    assert what == "failed" and isinstance(error, Cancelled)
    assert group.pool.counts().idle() and group.scheduler.idle()


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("error", [NodeLost("gone"), Cancelled("going"), ValueError("a bug")], ids=["lost", "cancelled", "bug"])
async def test_a_read_that_has_failed_frees_its_blocks(
    group: Group, source: tuple[ScriptedSource, str], error: Exception, given_up: bool
) -> None:
    begin(group, source[1])
    under_way = await reading(group)
    if given_up:
        group.give_up()
        await asyncio.sleep(0)
    under_way.set_exception(error)
    what, said = await group.word()
    assert what == "failed"
    assert isinstance(said, Cancelled if given_up else InternalError if isinstance(error, ValueError) else type(error))
    assert group.pool.counts().idle() and group.scheduler.idle()


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("how", ["says nothing", "is out of reach", "is cut off"])
async def test_a_read_without_an_end_keeps_its_blocks(source: tuple[ScriptedSource, str], how: str, given_up: bool) -> None:
    group = Group(read_s=0.05)
    begin(group, source[1])
    under_way = await reading(group)
    if given_up:
        group.give_up()
        await asyncio.sleep(0)
    if how == "is out of reach":
        under_way.set_exception(Unacknowledged("no answer"))
    elif how == "is cut off":
        under_way.cancel()
    what, error = await group.word()
    assert what == "lost" and isinstance(error, Unacknowledged)
    assert (group.pool.counts().quarantined, group.scheduler.stage(KEY)) == (2, Stage.QUARANTINED)
    assert not group.intake.cancel(KEY)
    await group.intake.close()
    assert under_way.done(), "nobody waits for it for ever"
    assert group.pool.counts().quarantined == 2
    await group.client.close()


class SlowToClose:
    """A channel that takes a while to close: a pull whose read has failed is then not over yet."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self.stream_stream = self._channel.stream_stream
        self.closing = False

    async def close(self, grace: float | None) -> None:
        self.closing = True
        await asyncio.sleep(0.05)
        await self._channel.close(grace)


@pytest.mark.parametrize("given_up_first", [False, True])
@pytest.mark.parametrize("error", [NodeLost("gone"), Unacknowledged("no answer")], ids=["failed", "unacknowledged"])
async def test_a_cancel_while_the_stream_is_left_changes_no_verdict(
    source: tuple[ScriptedSource, str], error: BatonError, given_up_first: bool
) -> None:
    channel = SlowToClose(source[1])
    group = Group(client=PullClient(max_channels=0, open_channel=lambda address: channel))
    begin(group, source[1])
    under_way = await reading(group)
    if given_up_first:
        group.give_up()
        await asyncio.sleep(0)
    under_way.set_exception(error)
    await eventually(lambda: channel.closing, "the end of the stream")
    group.give_up()
    what, _ = await group.word()
    assert what == ("lost" if isinstance(error, Unacknowledged) else "failed")
    assert group.pool.counts().quarantined == (2 if what == "lost" else 0)
    await group.intake.close()
    await group.client.close()


async def test_what_ends_before_it_has_begun_is_told_too(group: Group, source: tuple[ScriptedSource, str]) -> None:
    begin(group, source[1])
    group.give_up()
    what, error = await group.word()
    assert what == "failed" and isinstance(error, Cancelled)
    assert source[0].asked == [] and group.scheduler.idle()


async def test_a_node_that_cannot_be_reached_is_told(group: Group, source: tuple[ScriptedSource, str]) -> None:
    group.reads.unreachable = Unavailable("introduce it again")
    begin(group, source[1])
    assert await group.word() == ("failed", group.reads.unreachable)


async def test_a_bug_in_the_leader_ends_the_sequence(group: Group, source: tuple[ScriptedSource, str]) -> None:
    group.bug = RuntimeError("a bug")
    source[0].script = [QUEUED, announcement(0, 3, final=final())]
    begin(group, source[1])
    (await reading(group)).set_result(1)
    what, error = await group.word()
    assert what == "failed" and isinstance(error, InternalError)
    assert group.pool.counts().idle()


async def test_the_end_of_the_node_does_not_wait_for_a_release(source: tuple[ScriptedSource, str]) -> None:
    group = Group(handshake_s=60.0)
    source[0].script, source[0].last = [QUEUED, announcement(0, 3, final=final())], None
    begin(group, source[1])
    (await reading(group)).set_result(1)
    await eventually(lambda: source[0].asked == ["open", "release"], "the release")
    assert not group.intake.cancel(KEY), "the sequence runs: its end is not the pull's business"
    await group.intake.close()
    assert (await group.word())[0] == "pulled"
    await group.client.close()
