"""Both ends of a Pull against a peer that says anything: bytes that are no message, and messages with values at their edges.

The source tells such a peer so and goes on serving others; the puller raises one of our errors before its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline
from baton.errors import BatonError, Incompatible, InvalidRequest
from baton.rpc import bind, make_server, open_channel, to_error
from baton.v1 import inference_pb2, node_pb2, transfer_pb2, transfer_pb2_grpc
from kv_transfer.client import PullClient, export_of
from kv_transfer.lease import FinalToken
from kv_transfer.server import TransferService
from tests.fuzz.hostile import PATIENCE_S, WRITTEN_TOO_LATE, effort, messages, near, no_alarms, noise
from tests.fuzz.scripted import Liar

INCARNATION = b"i" * 16
PULLS = "/baton.v1.Transfer/Pulls"
OPEN = transfer_pb2.PullRequest(
    pull=1,
    open=transfer_pb2.PullOpen(
        lease=node_pb2.LeaseId(prefill_incarnation=INCARNATION, number=1), attempt=3, protocol_version=PROTOCOL_VERSION
    ),
)
LEAVE = transfer_pb2.PullRequest(pull=1, leave=transfer_pb2.PullLeave())
RELEASE = transfer_pb2.PullRequest(pull=1, release=transfer_pb2.PullRelease(attempt=3))
QUEUED = transfer_pb2.PullReply(pull=1, queued=transfer_pb2.PullQueued())
FINAL = inference_pb2.TokenLogprob(token_id=5, logprob=-1.0)
ANNOUNCED = transfer_pb2.PullReply(
    pull=1,
    announcement=transfer_pb2.Announcement(
        block_ids=[1, 2], generations=[10, 20], final=transfer_pb2.FinalToken(token_id=5, logprob=FINAL, finish_reason=1)
    ),
)
RELEASED = transfer_pb2.PullReply(pull=1, released=transfer_pb2.Released())


class Source:
    """A prefill leader's end with nobody behind it."""

    def __init__(self) -> None:
        self.service = TransferService(
            INCARNATION, on_ended=lambda *_: None, on_opened=lambda _: None, on_closed=lambda _: None, handshake_s=0.5, drain_s=0.5
        )
        self.server = make_server()
        transfer_pb2_grpc.add_TransferServicer_to_server(self.service, self.server)
        self.address = f"127.0.0.1:{bind(self.server, '127.0.0.1', 0)}"
        self.num_opened = 0

    async def serves(self, client: PullClient) -> bool:
        """Whether a good pull of a new lease gets what was announced."""
        self.num_opened += 1
        number = 1000 + self.num_opened
        self.service.open(number, Deadline.after(PATIENCE_S))
        self.service.announce(number, 0, [(7, 70)], FinalToken(0, 42, None, None))
        async with client.pull(self.address, INCARNATION, number, 1, 0, Deadline.after(PATIENCE_S)) as pull:
            told = [announced.block_ids async for announced in pull]
            await pull.release()
        return told == [(7,)]


@pytest.fixture
async def source() -> AsyncIterator[Source]:
    made = Source()
    await made.server.start()
    yield made
    made.service.close()
    await made.server.stop(None)


@pytest.fixture
async def client() -> AsyncIterator[PullClient]:
    made = PullClient(handshake_s=PATIENCE_S)
    yield made
    await made.close()


@pytest.fixture
async def liar() -> AsyncIterator[Liar]:
    made = Liar()
    await made.start()
    yield made
    await made.stop()


def asked(*requests: transfer_pb2.PullRequest) -> transfer_pb2.PullRequests:
    return transfer_pb2.PullRequests(requests=requests)


def told(*replies: transfer_pb2.PullReply) -> transfer_pb2.PullReplies:
    return transfer_pb2.PullReplies(replies=replies)


def said_to_source() -> st.SearchStrategy[list[bytes]]:
    """What a puller says: the right words in any order, spoilt or overdone, or none of them."""
    words = st.sampled_from([asked(OPEN), asked(RELEASE), asked(OPEN, RELEASE), asked(LEAVE)])
    spoilt = words.flatmap(lambda word: noise(word.SerializeToString()))
    overdone = (words.flatmap(near) | messages(transfer_pb2.PullRequests)).map(lambda message: message.SerializeToString())
    right = words.map(lambda word: word.SerializeToString())
    start = st.just([asked(OPEN).SerializeToString()]) | st.just([])
    return st.builds(list.__add__, start, st.lists(right | spoilt | overdone, max_size=3))


async def tell(channel: grpc.aio.Channel, lines: list[bytes]) -> BatonError | None:
    """How the source ends a stream on which this was said; None if it said its last word and closed."""
    call = channel.stream_stream(PULLS)()
    try:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # over already: reading says how
            for line in lines:
                await call.write(line)
            await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            continue
    except grpc.aio.AioRpcError as error:
        return to_error(error)
    return None


@effort(10)
@given(batch=st.lists(said_to_source(), min_size=10, max_size=20))
async def test_a_source_hears_anything_and_goes_on(source: Source, client: PullClient, batch: list[list[bytes]]) -> None:
    with no_alarms():
        if not source.num_opened:
            source.service.open(1, Deadline.after(PATIENCE_S))
        async with open_channel(source.address) as channel, asyncio.timeout(PATIENCE_S):
            ends = await asyncio.gather(*(tell(channel, lines) for lines in batch))
        strange = [end for end in ends if end is not None and not isinstance(end, (InvalidRequest, Incompatible))]
        assert all(end.message == WRITTEN_TOO_LATE for end in strange), strange
        assert await source.serves(client)


def said_to_puller() -> st.SearchStrategy[list[bytes]]:
    """A puller's line gives the numbers 1, 2, ...: what is said to others is late and heard by nobody."""
    expired = transfer_pb2.PullReply(pull=1, error=inference_pb2.ErrorDetail(cause="expired"))
    words = st.sampled_from([told(QUEUED), told(ANNOUNCED), told(QUEUED, ANNOUNCED), told(RELEASED), told(expired)])
    spoilt = words.flatmap(lambda word: noise(word.SerializeToString()))
    overdone = (words.flatmap(near) | messages(transfer_pb2.PullReplies)).map(lambda message: message.SerializeToString())
    right = words.map(lambda word: word.SerializeToString())
    start = st.just([told(QUEUED).SerializeToString()]) | st.just([])
    return st.builds(list.__add__, start, st.lists(right | spoilt | overdone, max_size=4))


@effort(60)
@given(lines=said_to_puller(), hangs_up=st.booleans())
async def test_a_puller_raises_one_of_our_errors_or_is_content(liar: Liar, client: PullClient, lines: list[bytes], hangs_up: bool) -> None:
    liar.lines, liar.hangs_up = lines, hangs_up
    with contextlib.suppress(BatonError):
        async with (
            asyncio.timeout(PATIENCE_S),
            client.pull(liar.address, INCARNATION, 1, 3, 0, Deadline.after(0.3)) as pull,
        ):
            async for announced in pull:
                assert len(announced.block_ids) == len(announced.generations)
            await pull.release()


@effort(100)
@given(message=messages(node_pb2.ExportHandle))
def test_an_export_is_one_that_can_be_or_is_refused(message: node_pb2.ExportHandle) -> None:
    try:
        export = export_of(message)
    except Incompatible as refused:
        assert len(refused.message) < 2000
    else:
        assert 0 <= export.layout.offset(0, export.layout.layer_start, 0, export.layout.head_start) < export.layout.nbytes < 2**63
