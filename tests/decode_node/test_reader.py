"""Reads of a decode group: prefill nodes come and go, ranks that forgot one are told again, and silence counts for more than an error."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from baton.deadline import Deadline
from baton.errors import BatonError, LeaseLost, NodeLost, Unavailable
from decode_node.reader import MAX_SOURCES, GroupReader, RankReader
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.reader import Reader
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export
from ranks.facts import ReadOrder
from ranks.service import Unacknowledged

LAYOUT = KVLayout(("block", "layer", "part", "head", "slot", "dim"), 4, 2, 0, 1, (4, 4), 0, 1, "float32", 1, 1)
SOON = 10.0


def incarnation(number: int) -> bytes:
    return number.to_bytes(16, "big")


def order(number: int) -> ReadOrder:
    return ReadOrder(incarnation(number), (1,), (100,), (2,))


class Rank:
    """One rank's reader over a pool of this process; as a follower, it answers as ranks.service.Peer does."""

    def __init__(self) -> None:
        self.thread = TransferThread()
        self.pool = Pool(4, LAYOUT.block_bytes, shared=False)
        self.pool.generations[1] = 100
        self.target = bytearray(LAYOUT.nbytes)
        pools = {self.pool.nonce: self.pool}
        self.reader = RankReader(Reader(self.thread, memoryview(self.target), LAYOUT, transport="loopback", pools=pools))
        self.exports = [Export(0, LAYOUT, "", "", "", self.pool.nonce, LAYOUT.nbytes)]
        self.told = 0
        self.error: BaseException | None = None

    async def sources(self, incarnation: bytes, exports: Sequence[Export]) -> str:
        self.told += 1
        return await self.reader.take_sources(incarnation, self.exports)

    async def read(self, order: ReadOrder, deadline: Deadline) -> int:
        if self.error:
            raise self.error
        return await self.reader.read(order, deadline)

    def close(self) -> None:
        self.thread.close()
        self.pool.close()


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    made = [Rank(), Rank()]
    yield made
    for rank in made:
        rank.close()


@pytest.fixture
def group(ranks: list[Rank]) -> GroupReader:
    return GroupReader(ranks[0].reader, ranks[1:])  # type: ignore[arg-type]


async def test_those_read_from_most_recently_stay_connected(ranks: list[Rank]) -> None:
    reader = ranks[0].reader
    for number in range(MAX_SOURCES):
        await reader.take_sources(incarnation(number), ranks[0].exports)
    assert await reader.read(order(0), Deadline.after(SOON))
    await reader.take_sources(incarnation(MAX_SOURCES), ranks[0].exports)
    assert await reader.read(order(0), Deadline.after(SOON))
    assert reader.knows(incarnation(1)) is None
    with pytest.raises(LeaseLost):
        await reader.read(order(1), Deadline.after(SOON))


async def test_a_rank_that_forgot_a_node_has_it_introduced_again(ranks: list[Rank], group: GroupReader) -> None:
    with pytest.raises(Unavailable, match="introduce it again"):
        await group.learn(incarnation(1), ())
    assert await group.learn(incarnation(1), ranks[0].exports) == "loopback"
    assert await group.read(order(1), Deadline.after(SOON)) == 2 * LAYOUT.block_bytes
    for number in range(2, MAX_SOURCES + 2):
        await ranks[1].reader.take_sources(incarnation(number), ranks[1].exports)
    assert await group.learn(incarnation(1), ()) == "loopback", "the leader has heard nothing of it"
    with pytest.raises(LeaseLost):
        await group.read(order(1), Deadline.after(SOON))
    with pytest.raises(Unavailable, match="introduce it again"):
        await group.learn(incarnation(1), ())
    await group.learn(incarnation(1), ranks[0].exports)
    assert await group.read(order(1), Deadline.after(SOON))
    assert ranks[1].told == 2


async def test_pulls_that_need_the_same_node_wait_for_one_attempt_to_reach_it(ranks: list[Rank], group: GroupReader) -> None:
    assert await asyncio.gather(*(group.learn(incarnation(1), ranks[0].exports) for _ in range(3))) == ["loopback"] * 3
    assert ranks[1].told == 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (NodeLost("the source is gone"), NodeLost),
        (Unacknowledged("no answer"), Unacknowledged),
        (asyncio.CancelledError(), Unacknowledged),
        (ValueError("a bug"), ValueError),
    ],
)
async def test_a_rank_that_says_nothing_counts_for_more_than_one_that_says_why(
    ranks: list[Rank], group: GroupReader, error: BaseException, raised: type[BaseException]
) -> None:
    """The other has failed, too, and earlier in line: nothing lands in its blocks, but the silent one's may still be written."""
    await group.learn(incarnation(1), ranks[0].exports)
    ranks[1].error = error
    ranks[0].pool.generations[1] = 7 if raised is Unacknowledged else 100
    with pytest.raises(raised) as caught:
        await group.read(order(1), Deadline.after(SOON))
    assert isinstance(caught.value, BatonError) is (raised is not ValueError)
