"""The source's door against peers that lie, flood it or hang, over real gRPC: each is refused or cut off, and nothing of it is left."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline
from baton.errors import LeaseLost
from baton.v1 import node_pb2, transfer_pb2, transfer_pb2_grpc
from kv_transfer.client import PullClient
from kv_transfer.lease import FinalToken, LeaseState
from kv_transfer.line import MAX_WORDS
from kv_transfer.server import TransferService

INCARNATION = b"a" * 16
FINAL = FinalToken(0, 42)
LOOK_EVERY_S, PATIENCE = 0.005, 2000


class Source:
    """A prefill leader's end, and what it was told."""

    def __init__(self, **limits: float) -> None:
        self.ended: list[tuple[int, LeaseState]] = []
        self.service = TransferService(
            INCARNATION,
            on_ended=lambda number, state: self.ended.append((number, state)),
            on_opened=lambda _: None,
            on_closed=lambda _: None,
            **limits,
        )
        self.address = ""

    def holds(self, number: int, num_blocks: int = 2) -> None:
        """A prompt is computed and announced."""
        self.service.open(number, Deadline.after(60))
        self.service.announce(number, 0, [(block, 1) for block in range(num_blocks)], FINAL)


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[tuple[Source, Any]]:
    """A source and a stub to talk to it without manners. In the end nothing is left there, whatever was said."""
    source = Source(**limits)
    server = rpc.make_server()
    transfer_pb2_grpc.add_TransferServicer_to_server(source.service, server)
    source.address = f"127.0.0.1:{rpc.bind(server, '127.0.0.1', 0)}"
    await server.start()
    async with rpc.open_channel(source.address) as channel:
        yield source, transfer_pb2_grpc.TransferStub(channel)
    source.service.close()
    await server.stop(None)
    await eventually(lambda: (source.service.num_leases, source.service.num_pulls) == (0, 0))


async def eventually(condition: Any) -> None:
    for _ in range(PATIENCE):
        if condition():
            return
        await asyncio.sleep(LOOK_EVERY_S)
    raise AssertionError("it did not come about")


def opening(number: int = 1, attempt: int = 1, have_blocks: int = 0, pull: int = 1) -> transfer_pb2.PullRequest:
    lease = node_pb2.LeaseId(prefill_incarnation=INCARNATION, number=number)
    return transfer_pb2.PullRequest(
        pull=pull,
        open=transfer_pb2.PullOpen(lease=lease, attempt=attempt, have_blocks=have_blocks, protocol_version=PROTOCOL_VERSION),
    )


def release(attempt: int = 1, pull: int = 1) -> transfer_pb2.PullRequest:
    return transfer_pb2.PullRequest(pull=pull, release=transfer_pb2.PullRelease(attempt=attempt))


def leave(pull: int = 1) -> transfer_pb2.PullRequest:
    return transfer_pb2.PullRequest(pull=pull, leave=transfer_pb2.PullLeave())


def said(*requests: transfer_pb2.PullRequest) -> transfer_pb2.PullRequests:
    return transfer_pb2.PullRequests(requests=requests)


def word(reply: transfer_pb2.PullReply) -> str:
    """An error by its cause."""
    return reply.error.cause if reply.HasField("error") else reply.WhichOneof("reply")


async def answers(stub: Any, *requests: transfer_pb2.PullRequest) -> list[str]:
    """What a peer hears that says all this at once, and then closes its side."""
    return [word(reply) async for message in stub.Pulls(iter([said(*requests)])) for reply in message.replies]


async def hears(call: Any, count: int) -> list[tuple[int, str]]:
    """So many words, each with the number of its Pull."""
    heard: list[tuple[int, str]] = []
    async with asyncio.timeout(10):
        while len(heard) < count:
            heard += [(reply.pull, word(reply)) for reply in (await call.read()).replies]
    return heard


async def read_well(source: Source, attempt: int) -> list[tuple[int, ...]]:
    """What a peer with manners is told of lease 1, which it releases then."""
    client = PullClient()
    try:
        async with client.pull(source.address, INCARNATION, 1, attempt, 0, Deadline.after(10)) as pull:
            blocks = [announced.block_ids async for announced in pull]
            await pull.release()
            return blocks
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ([opening(attempt=0)], ["attempt"]),
        ([opening(number=9, attempt=0)], ["attempt"]),
        ([opening(), opening()], ["queued", "invalid_request"]),
        ([opening(), release(attempt=7)], ["queued", "invalid_request"]),
        ([opening(), transfer_pb2.PullRequest(pull=1)], ["queued", "invalid_request"]),
    ],
    ids=["attempt 0", "attempt 0 of an unknown lease", "two openings", "another's release", "nothing"],
)
async def test_a_lie_is_the_end_of_its_pull_and_of_nothing_else(said: list[transfer_pb2.PullRequest], heard: list[str]) -> None:
    async with serving(drain_s=0.2) as (source, stub):
        source.service.open(1, Deadline.after(60))
        assert await answers(stub, *said) == heard
        await eventually(lambda: not source.service.num_pulls)
        assert source.service.num_leases == 1 and not source.ended
        source.service.announce(1, 0, [(7, 1)], FINAL)
        assert await read_well(source, attempt=3) == [(7,)]


async def test_a_release_before_the_last_announcement_gives_nothing_up() -> None:
    async with serving(drain_s=0.2) as (source, stub):
        source.service.open(1, Deadline.after(60))
        source.service.announce(1, 0, [(7, 1)])
        heard = await answers(stub, opening(), release())
        assert heard[0] == "queued" and heard[-1] == "invalid_request"
        assert not source.ended


async def test_a_peer_that_claims_more_blocks_than_there_are_is_told_so() -> None:
    async with serving(drain_s=0.2) as (source, stub):
        source.holds(1)
        assert await answers(stub, opening(have_blocks=3)) in (["queued", "have_blocks"], ["queued"])
        call = stub.Pulls()
        await call.write(said(opening(attempt=2, have_blocks=2**32 - 1)))
        assert await hears(call, 2) == [(1, "queued"), (1, "have_blocks")]
        assert not source.ended
        call.cancel()


async def test_pulls_beyond_the_most_are_refused_and_requests_still_find_room() -> None:
    async with serving(max_pulls=2, max_leases=3, handshake_s=0.5, drain_s=0.2) as (source, stub):
        calls = [stub.Pulls() for _ in range(5)]
        for number, call in enumerate(calls, 1):
            await call.write(said(opening(number)))
        first = [await hears(call, 1) for call in calls]
        assert sorted(heard for ((_, heard),) in first) == ["pulls"] * 3 + ["queued"] * 2
        source.service.open(99, Deadline.after(60))
        await eventually(lambda: (source.service.num_pulls, source.service.num_leases) == (0, 1))  # nobody asked for them in time
        assert await answers(stub, opening(99)) in (["queued"], [])


async def test_a_peer_that_takes_nothing_in_does_not_keep_its_lease() -> None:
    """Stopped in the middle of an announcement: the source's write does not end, but the lease does, and then the link."""
    async with serving(lease_s=0.3, drain_s=0.2) as (source, stub):
        call = stub.Pulls()
        await call.write(said(opening()))
        await eventually(lambda: source.service.num_pulls == 1)
        source.service.open(1, Deadline.after(60))
        num_blocks = 600_000
        source.service.announce(1, 0, [(block, 2**40 + block) for block in range(num_blocks)], FINAL)
        await eventually(lambda: source.ended == [(1, LeaseState.EXPIRED)])
        assert not source.service.num_pulls
        with pytest.raises(LeaseLost):
            await read_well(source, attempt=2)
        call.cancel()


async def test_whoever_never_opens_is_sent_away() -> None:
    async with serving(handshake_s=0.1) as (source, stub):
        calls = [stub.Pulls() for _ in range(20)]
        assert {(await call.code()).name for call in calls} == {"INVALID_ARGUMENT"}
        assert source.service.num_leases == 0


async def test_pulls_that_share_a_stream_do_not_share_their_fate() -> None:
    """One is refused, one lies, one leaves, one is read to its end; what is said too late, of those that are over, is not heard."""
    async with serving(drain_s=0.2) as (source, stub):
        for number in (1, 2, 3):
            source.service.open(number, Deadline.after(60))
        call = stub.Pulls()
        await call.write(said(opening(1, pull=1), opening(2, pull=2), opening(9, attempt=0, pull=3), opening(3, pull=4)))
        assert sorted(await hears(call, 4)) == [(1, "queued"), (2, "queued"), (3, "attempt"), (4, "queued")]
        await call.write(said(release(attempt=7, pull=1), leave(pull=2)))
        assert await hears(call, 1) == [(1, "invalid_request")]
        await eventually(lambda: source.service.num_pulls == 1)
        source.service.announce(3, 0, [(7, 1)], FINAL)
        assert await hears(call, 1) == [(4, "announcement")]
        await call.write(said(leave(pull=1), release(pull=2), leave(pull=3), release(pull=4), leave(pull=4)))
        assert await hears(call, 1) == [(4, "released")]
        assert source.ended == [(3, LeaseState.RELEASED)] and source.service.num_leases == 2
        call.cancel()


async def test_what_becomes_known_at_once_goes_as_one_message() -> None:
    async with serving() as (source, stub):
        call = stub.Pulls()
        await call.write(said(*(opening(number, pull=number) for number in range(1, 41))))
        await hears(call, 40)
        for number in range(1, 41):
            source.holds(number)
        message = await call.read()
        assert [(reply.pull, word(reply)) for reply in message.replies] == [(number, "announcement") for number in range(1, 41)]
        call.cancel()


@pytest.mark.parametrize("numbers", [(1, 1), (2, 1), (0,)], ids=["used", "lower", "zero"])
async def test_numbers_of_pulls_only_rise(numbers: tuple[int, ...]) -> None:
    async with serving(drain_s=0.2) as (source, stub):
        source.holds(1)
        heard = await answers(stub, *(request for pull in numbers for request in (opening(attempt=5 - pull, pull=pull), leave(pull))))
        assert heard[-1] == "invalid_request" and not source.ended
        await eventually(lambda: not source.service.num_pulls)


async def test_the_end_of_a_stream_is_the_end_of_its_pulls() -> None:
    async with serving() as (source, stub):
        calls = [stub.Pulls() for _ in range(2)]
        for number in (1, 2, 3):
            source.service.open(number, Deadline.after(60))
            await calls[number % 2].write(said(opening(number, pull=number)))
            await hears(calls[number % 2], 1)
        assert source.service.num_pulls == 3
        calls[1].cancel()
        await eventually(lambda: source.service.num_pulls == 1)
        await calls[0].done_writing()
        await eventually(lambda: not source.service.num_pulls)


async def test_a_puller_that_asks_and_does_not_listen_is_cut_off() -> None:
    """It takes in nothing, and asks on: so much is kept for it, and no more."""
    async with serving(max_pulls=2) as (source, stub):
        source.service.open(1, Deadline.after(60))
        source.service.announce(1, 0, [(block, 2**40 + block) for block in range(2_000_000)], FINAL)  # more than connections hold
        call = stub.Pulls()
        await call.write(said(opening(1, pull=1)))
        await eventually(lambda: source.service.num_pulls == 1)
        for number in range(3):
            wrong = [opening(1, attempt=0, pull=2 + MAX_WORDS * number + word) for word in range(MAX_WORDS)]
            await call.write(said(*wrong))
        await eventually(lambda: not source.service.num_pulls)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await hears(call, 10 * MAX_WORDS)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_of_too_many_words_is_not_heard() -> None:
    async with serving() as (source, stub):
        source.holds(1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answers(stub, opening(1), *[leave(pull) for pull in range(MAX_WORDS)])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not source.service.num_pulls)
