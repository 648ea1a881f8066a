"""Leases and announcements over real gRPC, in one loop: what both leaders see, in good days and when either side goes away."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline
from baton.errors import Cancelled, DeadlineExceeded, Incompatible, InvalidRequest, LeaseLost, NodeLost
from baton.request import FinishReason, TokenLogprob
from baton.v1 import node_pb2, transfer_pb2, transfer_pb2_grpc
from kv_transfer.client import Pull, PullClient, export_of, layout_of
from kv_transfer.layout import KVLayout
from kv_transfer.lease import Announced, FinalToken, LeaseState
from kv_transfer.line import Lines, surplus
from kv_transfer.server import TransferService, export_message, layout_message
from kv_transfer.transport import Export

A, B = b"a" * 16, b"b" * 16
SOON = 10.0
FINAL = FinalToken(0, 42, TokenLogprob(42, -0.5, ((42, -0.5), (7, -1.5))), FinishReason.STOP)


class Source:
    """A prefill leader's end, and what it was told."""

    def __init__(self, **limits: float) -> None:
        self.told: list[tuple[str, int, LeaseState | None]] = []
        self.changed = asyncio.Event()
        self.service = TransferService(
            A,
            on_ended=lambda number, state: self.note("ended", number, state),
            on_opened=lambda number: self.note("opened", number),
            on_closed=lambda number: self.note("closed", number),
            node="prefill-7",
            **limits,
        )
        self.server = rpc.make_server()
        transfer_pb2_grpc.add_TransferServicer_to_server(self.service, self.server)
        self.address = f"127.0.0.1:{rpc.bind(self.server, '127.0.0.1', 0)}"

    def note(self, what: str, number: int, state: LeaseState | None = None) -> None:
        self.told.append((what, number, state))
        self.changed.set()

    async def hears(self, what: str, number: int = 1, state: LeaseState | None = None) -> None:
        async with asyncio.timeout(SOON):
            while (what, number, state) not in self.told:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Awaitable[Source]]]:
    made: list[Source] = []

    async def start(**limits: float) -> Source:
        made.append(Source(**limits))
        await made[-1].server.start()
        return made[-1]

    yield start
    for source in made:
        source.service.close()
        await source.server.stop(None)
        for _ in range(1000):  # stop does not wait for what it cancels
            if source.service.num_pulls:
                await asyncio.sleep(0.01)
        assert (source.service.num_leases, source.service.num_pulls) == (0, 0)


@pytest.fixture
async def source(make: Callable[..., Awaitable[Source]]) -> Source:
    return await make()


@pytest.fixture
async def client() -> AsyncIterator[PullClient]:
    made = PullClient()
    yield made
    await made.close()


def soon() -> Deadline:
    return Deadline.after(SOON)


def said(*requests: transfer_pb2.PullRequest) -> transfer_pb2.PullRequests:
    return transfer_pb2.PullRequests(requests=requests)


def pull(
    client: PullClient, source: Source, attempt: int = 1, have_blocks: int = 0, number: int = 1, deadline: Deadline | None = None
) -> Pull:
    return client.pull(source.address, A, number, attempt, have_blocks, deadline or soon())


async def test_blocks_are_announced_as_they_come_and_released(source: Source, client: PullClient) -> None:
    assert not source.service.open(1, soon())
    source.service.announce(1, 0, [(7, 70), (8, 80)])
    async with pull(client, source) as stream:
        assert await anext(stream) == Announced(0, (7, 8), (70, 80))
        source.service.announce(1, 2, [(9, 90)])
        assert await anext(stream) == Announced(2, (9,), (90,))
        source.service.announce(1, 3, [(4, 40)], FINAL)
        assert [announced async for announced in stream] == [Announced(3, (4,), (40,), FINAL)]
        assert source.told == [("opened", 1, None)]
        await stream.release()
        assert source.told[1:] == [("ended", 1, LeaseState.RELEASED)]
    assert source.service.num_leases == 0


async def test_what_the_puller_has_is_not_announced_and_what_it_missed_comes_merged(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    source.service.announce(1, 0, [(block, 1) for block in range(3)])
    source.service.announce(1, 3, [(block, 2) for block in range(3, 6)], FINAL)
    async with pull(client, source, have_blocks=2) as stream:
        assert [announced async for announced in stream] == [Announced(2, (2, 3, 4, 5), (1, 2, 2, 2), FINAL)]


async def test_a_pull_may_come_first(source: Source, client: PullClient) -> None:
    async with pull(client, source) as stream:
        assert source.service.open(1, soon())
        assert not source.service.rewind(1)
        source.service.announce(1, 0, [], FINAL)
        assert await anext(stream) == Announced(0, (), (), FINAL)
    await source.hears("closed")


async def test_a_pull_whose_request_never_comes_is_told_so(make: Callable[..., Awaitable[Source]], client: PullClient) -> None:
    source = await make(handshake_s=0.1)
    async with pull(client, source) as stream:
        with pytest.raises(LeaseLost, match="expired"):
            await anext(stream)
    assert source.told == []


async def test_a_pull_that_left_without_release_keeps_the_lease_for_the_next(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    source.service.announce(1, 0, [(7, 70)], FINAL)
    async with pull(client, source) as first:
        await anext(first)
    await source.hears("closed")
    async with pull(client, source, attempt=2) as second:
        assert [announced async for announced in second] == [Announced(0, (7,), (70,), FINAL)]
        await second.release()
    assert source.told[-1] == ("ended", 1, LeaseState.RELEASED)


async def test_a_higher_attempt_fences_and_its_release_waits_for_the_fenced_reads(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    source.service.announce(1, 0, [(7, 70)], FINAL)
    async with pull(client, source, attempt=2) as low:
        await anext(low)
        async with pull(client, source, attempt=5) as high:
            for attempt in (1, 5):
                with pytest.raises(LeaseLost, match="fenced by attempt 5"):
                    async with pull(client, source, attempt=attempt):
                        raise AssertionError("entered")
            await anext(high)
            await high.release()
            assert source.service.num_leases == 1, "the fenced one may still be reading"
            with pytest.raises(LeaseLost, match="fenced"):
                await low.release()
    await source.hears("ended", state=LeaseState.RELEASED)
    assert ("closed", 1, None) not in source.told


async def test_a_fenced_peer_that_does_not_leave_is_cut_off(make: Callable[..., Awaitable[Source]], client: PullClient) -> None:
    source = await make(drain_s=0.1)
    source.service.open(1, soon())
    source.service.announce(1, 0, [(7, 70)], FINAL)
    async with pull(client, source, attempt=1), pull(client, source, attempt=2) as high:
        await anext(high)
        await high.release()
        await source.hears("ended", state=LeaseState.RELEASED)


async def test_an_unread_lease_expires_and_its_pull_with_it(make: Callable[..., Awaitable[Source]], client: PullClient) -> None:
    source = await make(lease_s=0.1)
    for number in (1, 2):
        source.service.open(number, soon())
        source.service.announce(number, 0, [(7, 70)], FINAL)
    async with pull(client, source, number=2) as stream:
        await anext(stream)
        await source.hears("ended", 1, LeaseState.EXPIRED)
        await asyncio.sleep(0.2)  # the pull has put the expiry of the second off; its timer is in this very loop
        with pytest.raises(LeaseLost, match="expired"):
            await stream.release()
        assert ("ended", 2, LeaseState.EXPIRED) not in source.told
    await source.hears("ended", 2, LeaseState.EXPIRED)


async def test_a_lease_does_not_expire_while_its_blocks_are_being_read(make: Callable[..., Awaitable[Source]]) -> None:
    """Design rule 5: a lease is counted from the last announcement or read. The reads here take three times as long as the lease."""
    source, client = await make(lease_s=0.5), PullClient(progress_s=0.1)
    source.service.open(1, Deadline.after(SOON))
    async with pull(client, source) as stream:
        source.service.announce(1, 0, [(5, 1)], FINAL)
        await anext(stream)
        until = Deadline.after(1.5)
        while not until.passed():
            await asyncio.sleep(0.05)  # a portion
            stream.progress()
        await stream.release()
    await source.hears("ended", 1, LeaseState.RELEASED)
    await client.close()


async def test_a_request_that_fails_tells_its_puller_why(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    async with pull(client, source) as stream:
        source.service.fail(1, Cancelled("the client has left", stage="prefill"))
        with pytest.raises(LeaseLost, match="the client has left") as caught:
            await anext(stream)
        assert (caught.value.node, caught.value.stage, caught.value.cause) == ("prefill-7", "prefill", "cancelled")
    await source.hears("ended", state=LeaseState.FAILED)
    assert not source.service.announce(1, 0, [(1, 1)])


async def test_a_cancelled_number_is_refused(source: Source, client: PullClient) -> None:
    source.service.fail(1, Cancelled("early"))
    with pytest.raises(LeaseLost):
        async with pull(client, source):
            raise AssertionError("entered")


async def test_a_rewound_lease_is_announced_anew(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    source.service.announce(1, 0, [(7, 70), (8, 80)], FINAL)
    assert source.service.rewind(1) and source.told == []
    async with pull(client, source) as stream:
        source.service.announce(1, 0, [(3, 30)])
        assert await anext(stream) == Announced(0, (3,), (30,))
        source.service.announce(1, 1, [(4, 40)], FINAL)
        assert await anext(stream) == Announced(1, (4,), (40,), FINAL)
        await stream.release()
    source.service.open(2, soon())
    source.service.accept(2)
    assert not source.service.rewind(2) and not source.service.rewind(3)


async def test_a_lease_is_closed_when_its_last_reader_has_left(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    async with pull(client, source, attempt=1):
        async with pull(client, source, attempt=2):
            pass
        for _ in range(1000):
            if source.service.num_pulls > 1:
                await asyncio.sleep(0.01)
        assert source.service.num_pulls == 1
        assert ("closed", 1, None) not in source.told, "the fenced one may still be reading"
    await source.hears("closed")


async def test_a_listener_that_fails_does_not_stop_the_clock() -> None:
    second_ended = asyncio.Event()

    def fails_at_first(number: int, _: LeaseState) -> None:
        if number == 1:
            raise RuntimeError("a bug")
        second_ended.set()

    bugs: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: bugs.append(context["exception"]))
    ignore: Callable[[int], None] = lambda _: None  # noqa: E731
    service = TransferService(A, on_ended=fails_at_first, on_opened=ignore, on_closed=ignore)
    service.open(1, Deadline.after(0.02))
    service.open(2, Deadline.after(0.1))
    async with asyncio.timeout(SOON):
        await second_ended.wait()
    assert len(bugs) == 1
    service.close()


async def test_another_incarnation_or_protocol_is_refused(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    with pytest.raises(LeaseLost, match="incarnation"):
        async with client.pull(source.address, B, 1, 1, 0, soon()):
            raise AssertionError("entered")
    opening = transfer_pb2.PullOpen(attempt=1, protocol_version=99)
    async with rpc.open_channel(source.address) as channel:
        call = transfer_pb2_grpc.TransferStub(channel).Pulls(iter([said(transfer_pb2.PullRequest(pull=1, open=opening))]))
        assert [reply.error.cause async for message in call for reply in message.replies] == ["incompatible"]


async def test_a_puller_of_another_protocol_is_told_both_versions_and_does_not_try_again(source: Source) -> None:
    """As a puller from an older version meets it: no other lease would help."""
    source.service.open(1, soon())
    lines = Lines(rpc.open_channel, 1)
    opening = transfer_pb2.PullOpen(attempt=1, protocol_version=PROTOCOL_VERSION + 1)
    with pytest.raises(Incompatible, match=f"protocol {PROTOCOL_VERSION + 1}, this node {PROTOCOL_VERSION}") as caught:
        async with Pull(lines, source.address, opening, 5.0, soon()):
            raise AssertionError("entered")
    assert (caught.value.retryable, caught.value.node) == (False, "prefill-7")
    await lines.close()


async def test_nonsense_on_the_stream_is_refused(make: Callable[..., Awaitable[Source]]) -> None:
    source = await make(handshake_s=0.1, drain_s=0.1)
    source.service.open(1, soon())
    release = transfer_pb2.PullRequest(pull=1, release=transfer_pb2.PullRelease(attempt=1))
    opening = transfer_pb2.PullRequest(pull=1, open=transfer_pb2.PullOpen(attempt=1, protocol_version=PROTOCOL_VERSION))
    opening.open.lease.prefill_incarnation, opening.open.lease.number = A, 1
    async with rpc.open_channel(source.address) as channel:
        stub = transfer_pb2_grpc.TransferStub(channel)
        for requests in ([release], [], [transfer_pb2.PullRequest()]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(stub.Pulls(iter([said(*requests)]))))
            assert isinstance(rpc.to_error(caught.value), InvalidRequest)
        silent = stub.Pulls()
        assert await silent.code() is grpc.StatusCode.INVALID_ARGUMENT
        for attempt, second in (
            (1, opening),
            (2, release),
            (3, transfer_pb2.PullRequest(pull=1, release=transfer_pb2.PullRelease(attempt=3))),
        ):
            opening.open.attempt = attempt
            call = stub.Pulls(iter([said(opening, second)]))
            replies = [reply.WhichOneof("reply") async for message in call for reply in message.replies]
            assert replies == ["queued", "error"]
    assert ("ended", 1, LeaseState.RELEASED) not in source.told


async def test_a_node_that_is_not_there_is_lost(source: Source, client: PullClient) -> None:
    await source.server.stop(None)
    with pytest.raises(NodeLost):
        async with pull(client, source):
            raise AssertionError("entered")


async def test_a_node_that_goes_down_during_a_pull_is_lost_and_so_is_one_whose_channel_is_closed(
    source: Source, client: PullClient
) -> None:
    source.service.open(1, soon())
    async with pull(client, source) as stream:
        await client.close()
        with pytest.raises((NodeLost, asyncio.CancelledError)):
            await anext(stream)
    async with pull(client, source, attempt=2) as stream:
        await source.server.stop(None)
        with pytest.raises(NodeLost):
            await anext(stream)


async def test_a_peer_that_accepts_but_never_answers_is_lost() -> None:
    client = PullClient(handshake_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts for a process that is stopped
        with pytest.raises(NodeLost, match="not answered") as caught:
            async with client.pull(f"127.0.0.1:{silent.getsockname()[1]}", A, 1, 1, 0, soon()):
                raise AssertionError("entered")
        assert caught.value.retryable
        with pytest.raises(DeadlineExceeded):
            async with client.pull(f"127.0.0.1:{silent.getsockname()[1]}", A, 1, 1, 0, Deadline.after(0.05)):
                raise AssertionError("entered")
        await client.close()


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 2), max_size=8), st.integers(0, 6))
def test_surplus_lines_are_idle_oldest_first_and_no_more_than_needed(open_pulls: dict[str, int], most: int) -> None:
    gone = surplus(open_pulls, most)
    idle = [address for address in open_pulls if not open_pulls[address]]
    assert list(gone) == idle[: len(gone)]
    assert len(gone) == min(len(idle), max(0, len(open_pulls) - most))


async def test_channels_to_nodes_that_came_and_went_are_closed(make: Callable[..., Awaitable[Source]]) -> None:
    """Least recently used first, those in use never, also after Pulls that could not begin; a closed one is opened anew."""
    sources = [await make() for _ in range(4)]
    client = PullClient(max_channels=2)
    for source in sources:
        source.service.open(1, soon())
    async with pull(client, sources[0]) as oldest, pull(client, sources[1]), pull(client, sources[2]):
        with pytest.raises(LeaseLost, match="incarnation"):
            async with client.pull(sources[3].address, B, 1, 1, 0, soon()):
                raise AssertionError("entered")
        assert client.num_channels == 3, "those in use are kept, whatever the limit"
        sources[0].service.announce(1, 0, [(7, 70)], FINAL)
        assert await anext(oldest) == Announced(0, (7,), (70,), FINAL)
        await oldest.release()
    assert client.num_channels == 2
    async with pull(client, sources[3]):
        assert client.num_channels == 3
    assert client.num_channels == 2
    await client.close()
    assert client.num_channels == 0


class SlowToClose:
    """A channel as far as Lines need it, which lets others run while it closes."""

    def __init__(self) -> None:
        self.closed = False

    async def close(self, grace: float | None) -> None:
        """See grpc.aio.Channel."""
        await asyncio.sleep(0)
        self.closed = True


async def test_a_line_that_is_taken_while_others_are_closed_stays_open() -> None:
    lines = Lines(lambda _: SlowToClose(), 2)  # type: ignore[arg-type,return-value]
    for line in [lines.take(address) for address in "ab"]:
        await lines.give_back(line)
    used = [lines.take(address) for address in "cd"]
    leaving = [asyncio.create_task(lines.give_back(line)) for line in used]  # a and b are surplus now
    await asyncio.sleep(0)
    again = lines.take("b")
    await asyncio.gather(*leaving)
    assert not again.channel.closed  # type: ignore[attr-defined]
    await lines.close()
    assert all(line.channel.closed for line in (*used, again))  # type: ignore[attr-defined]


async def test_a_line_on_which_a_peer_was_lost_is_taken_by_nobody_and_closed_with_its_last_pull() -> None:
    lines = Lines(lambda _: SlowToClose(), 9)  # type: ignore[arg-type,return-value]
    lost = lines.take("a")
    assert lines.take("a") is lost
    await lines.give_back(lost, lost=True)
    assert not lost.channel.closed and len(lines) == 0  # type: ignore[attr-defined]
    fresh = lines.take("a")
    assert fresh is not lost
    await lines.give_back(lost)
    assert lost.channel.closed and not fresh.channel.closed  # type: ignore[attr-defined]
    await lines.give_back(fresh)
    assert len(lines) == 1 and not fresh.channel.closed  # type: ignore[attr-defined]
    await lines.close()
    assert fresh.channel.closed  # type: ignore[attr-defined]


async def test_nothing_announced_in_time(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    async with pull(client, source, deadline=Deadline.after(0.3)) as stream:
        with pytest.raises(DeadlineExceeded):
            await anext(stream)


async def test_closing_the_service_ends_every_lease(source: Source, client: PullClient) -> None:
    source.service.open(1, soon())
    source.service.open(2, soon())
    async with pull(client, source) as stream:
        assert (source.service.num_leases, source.service.num_pulls) == (2, 1)
        source.service.close()
        assert source.told[-1] == ("ended", 2, LeaseState.FAILED)
        with pytest.raises(LeaseLost, match="closing"):
            await anext(stream)
    await source.hears("ended", 1, LeaseState.FAILED)


async def test_many_pulls_at_once(source: Source, client: PullClient) -> None:
    async def one(number: int) -> None:
        async with pull(client, source, number=number) as stream:
            announced = [part async for part in stream]
            assert sum(len(part.block_ids) for part in announced) == 10 and announced[-1].final == FINAL
            await stream.release()

    pulls = [asyncio.create_task(one(number)) for number in range(1, 51)]
    for number in range(1, 51):
        source.service.open(number, soon())
    for block in range(10):
        for number in range(1, 51):
            source.service.announce(number, block, [(block, number)], FINAL if block == 9 else None)
        await asyncio.sleep(0)
    await asyncio.gather(*pulls)
    assert [state for what, _, state in source.told if what == "ended"] == [LeaseState.RELEASED] * 50


def test_layouts_and_exports_survive_the_wire(layout: Callable[..., KVLayout]) -> None:
    export = Export(3, layout(), "host", "@socket", "127.0.0.1:9", b"n" * 16, layout().nbytes)
    assert layout_of(layout_message(layout())) == layout() and export_of(export_message(export)) == export
    broken = export_message(export)
    broken.nonce = b"short"
    with pytest.raises(Incompatible):
        export_of(broken)
    latent = layout(heads=range(1), part_dims=(512, 64))
    assert layout_of(layout_message(latent)) == latent


@pytest.mark.parametrize("change", [{"num_heads": 99}, {"part_dims": []}, {"part_dims": [4, 0]}, {"axes": ["block"]}, {"dtype": "int3"}])
def test_a_layout_that_describes_nothing_is_refused(layout: Callable[..., KVLayout], change: dict[str, object]) -> None:
    sound = {field.name: getattr(layout(), field.name) for field in fields(KVLayout)}
    assert layout_of(node_pb2.KVLayout(**sound)) == layout()
    with pytest.raises(Incompatible):
        layout_of(node_pb2.KVLayout(**sound | change))
