"""Every transport moves exactly the planned bytes, refuses what changed, and leaves nothing behind; the way is proven, not assumed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Incompatible, InvalidRequest, LeaseLost, NodeLost, Unavailable
from kv_transfer.choose import Transport
from kv_transfer.copying import SLICE_BYTES, move, move_by_python, sliced
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.reader import Reader
from kv_transfer.source import SourceRank
from kv_transfer.tcp_frame import MAX_BLOCKS
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Spans

SOON = 10.0
A = b"a" * 16
TRANSPORTS: tuple[Transport, ...] = ("loopback", "shm", "tcp")
Make = Callable[..., KVLayout]


class Pair:
    """Source ranks and one target in this process, each side with a transfer thread of its own."""

    def __init__(self, transport: Transport, sources: Sequence[KVLayout], target: KVLayout, **reader: int) -> None:
        self.threads = [TransferThread("source"), TransferThread("target")]
        self.layouts = sources
        self.pools = [Pool(layout.num_blocks, layout.block_bytes) for layout in sources]
        for rank, pool in enumerate(self.pools):
            pool.data[:] = np.random.default_rng(rank).bytes(len(pool.data))
            pool.generations[:] = np.arange(100, 100 + pool.num_blocks)
        self.sources = [
            SourceRank(self.threads[0], pool, layout, rank=rank)
            for rank, (pool, layout) in enumerate(zip(self.pools, sources, strict=True))
        ]
        self.exports = [source.export for source in self.sources]
        self.target_layout = target
        self.target = memoryview(bytearray(target.nbytes))
        pools = {pool.nonce: pool for pool in self.pools}
        self.reader = Reader(self.threads[1], self.target, target, transport=transport, pools=pools, **reader)

    def connect(self) -> None:
        self.peer = self.reader.connect(A, self.exports, Deadline.after(SOON))

    def read(self, source_blocks: Sequence[int], target_blocks: Sequence[int], generations: Sequence[int] | None = None) -> int:
        expected = generations or [100 + block for block in source_blocks]
        return self.reader.read(A, source_blocks, expected, target_blocks, Deadline.after(SOON)).wait(Deadline.after(SOON))

    def check(self, source_blocks: Sequence[int], target_blocks: Sequence[int]) -> None:
        """Compare piece by piece with any source that owns it; everything else is untouched."""
        wanted = bytearray(len(self.target))
        layout = self.target_layout
        for source, target in zip(source_blocks, target_blocks, strict=True):
            for layer, part, head in ((x, p, h) for x in layout.layers for p in range(layout.num_parts) for h in layout.heads):
                rank = next(rank for rank, owner in enumerate(self.layouts) if owner.owns(layer, head))
                at, to = self.layouts[rank].offset(source, layer, part, head), layout.offset(target, layer, part, head)
                wanted[to : to + layout.piece_bytes(part)] = self.pools[rank].data[at : at + layout.piece_bytes(part)]
        assert self.target == wanted

    def close(self) -> None:
        self.reader.close()
        for source in self.sources:
            source.close()
        for thread in self.threads:
            thread.close()
            assert thread.failure is None
        for pool in self.pools:
            pool.close()


@pytest.fixture
def pair(no_leaks: None) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(transport: Transport, sources: Sequence[KVLayout], target: KVLayout, connected: bool = True, **reader: int) -> Pair:
        pairs.append(Pair(transport, sources, target, **reader))
        if connected:
            pairs[-1].connect()
        return pairs[-1]

    yield make
    while pairs:
        pairs.pop().close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "axes", [("block", "layer", "part", "head"), ("layer", "part", "block", "head"), ("head", "block", "part", "layer")]
)
@pytest.mark.parametrize("heads", [[range(4)], [range(2), range(2, 4)], [range(2), range(2), range(2, 4), range(2, 4)]])
@pytest.mark.parametrize("wanted", [range(4), range(1, 2)])
def test_random_blocks_arrive_where_the_plan_says(
    pair: Callable[..., Pair], layout: Make, transport: Transport, axes: tuple[str, ...], heads: list[range], wanted: range
) -> None:
    full = (*axes, "slot", "dim")
    sources = [layout(full, 12, heads=part) for part in heads]
    made = pair(transport, sources, layout(full, 9, heads=wanted), earlier=[layout(full, 9, heads=wanted)])
    source_blocks, target_blocks = [3, 4, 11, 0, 7], [0, 1, 8, 4, 5]
    for rank, pool in enumerate(made.pools):  # replicas hold the same
        pool.data[:] = made.pools[next(first for first, part in enumerate(heads) if part == heads[rank])].data
    assert made.read(source_blocks, target_blocks) == 5 * made.target_layout.block_bytes
    made.check(source_blocks, target_blocks)
    assert made.peer.transport == transport and made.peer.block_bytes == made.target_layout.block_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_reads_in_many_pieces(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    big = {"num_blocks": 16, "part_dims": (256, 256), "block_size": 64}  # 64 KiB pieces, 1.5 MiB a block
    made = pair(transport, [layout(heads=range(2), **big), layout(heads=range(2, 4), **big)], layout(**big))
    order = np.random.default_rng(1).permutation(16)
    source_blocks, target_blocks = order[:12].tolist(), order[::-1][:12].tolist()
    assert made.read(source_blocks, target_blocks) > 2 * SLICE_BYTES
    made.check(source_blocks, target_blocks)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_reads_at_once(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    made = pair(transport, [layout(num_blocks=64, part_dims=(64, 64))], layout(num_blocks=64, part_dims=(64, 64)))
    tickets = [made.reader.read(A, [block], [100 + block], [63 - block], Deadline.after(SOON)) for block in range(64)]
    assert {ticket.wait(Deadline.after(SOON)) for ticket in tickets} == {made.target_layout.block_bytes}
    made.check(range(64), range(63, -1, -1))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_content_than_announced_is_refused(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    made = pair(transport, [layout()], layout())
    with pytest.raises(LeaseLost, match="other content"):
        made.read([1, 2], [1, 2], [101, 77])
    assert not any(made.target), "refused before a byte moved"
    made.pools[0].generations[2] = 77
    assert made.read([1, 2], [1, 2], [101, 77])
    with pytest.raises(LeaseLost, match="other content"):
        made.read([2], [1])


@pytest.mark.parametrize("transport", ["loopback", "shm"])
def test_content_that_changes_during_the_read_is_refused(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    big = {"num_blocks": 24, "part_dims": (256, 256), "block_size": 64}
    made = pair(transport, [layout(**big)], layout(**big))
    thread = made.threads[1]

    def stamp() -> Iterator[None]:  # has its turn between two slices of the copy
        made.pools[0].generations[2] = 7
        yield

    def start() -> None:
        made.reader.read(A, range(0, 24, 2), range(100, 124, 2), range(0, 24, 2), Deadline.after(SOON)).future.add_done_callback(
            ended.append
        )
        thread.post(lambda: thread.work(stamp()))

    ended: list[object] = []
    thread.run(start, Deadline.after(SOON))
    while not ended:
        thread.run(lambda: None, Deadline.after(SOON))
    error = ended[0].exception()
    assert isinstance(error, LeaseLost) and error.cause == "generation"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pool_that_was_given_up_is_refused(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    made = pair(transport, [layout()], layout())
    made.pools[0].close()
    with pytest.raises(LeaseLost):
        made.read([1], [1])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_source_that_closed_is_a_lost_node(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    made = pair(transport, [layout()], layout())
    assert made.read([1], [1])
    made.sources[0].close()
    for _ in range(2):
        with pytest.raises(NodeLost):
            made.read([1], [1])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_passed_deadline_an_abort_and_a_close_end_a_read(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    made = pair(transport, [layout()], layout())
    with pytest.raises(DeadlineExceeded):
        made.reader.read(A, [1], [101], [1], Deadline.after(-1)).wait(Deadline.after(SOON))
    ticket = made.threads[1].run(lambda: _aborted(made.reader), Deadline.after(SOON))
    with pytest.raises(Cancelled):
        ticket.wait(Deadline.after(SOON))
    late = made.threads[1].run(lambda: _forgotten(made.reader), Deadline.after(SOON))
    with pytest.raises(LeaseLost):
        late.wait(Deadline.after(SOON))
    with pytest.raises(LeaseLost, match="not connected"):
        made.read([1], [1])
    assert not any(made.target)


def _aborted(reader: Reader):
    """On the thread itself, so that read and abort come in this order and nothing in between."""
    ticket = reader.read(A, [1], [101], [1], Deadline.after(SOON))
    ticket.abort()
    return ticket


def _forgotten(reader: Reader):
    ticket = reader.read(A, [1], [101], [1], Deadline.after(SOON))
    reader.forget(A)
    return ticket


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_read_that_comes_after_the_end_of_its_destination_ends_too(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    """It was under way to the thread when the node was forgotten."""
    made = pair(transport, [layout()], layout())
    made.threads[1].run(lambda: made.peer.destinations[0].close(LeaseLost("forgotten")), Deadline.after(SOON))
    with pytest.raises(LeaseLost, match="forgotten"):
        made.read([1], [1])
    assert not any(made.target)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_blocks_outside_of_a_pool_are_refused(pair: Callable[..., Pair], layout: Make, transport: Transport) -> None:
    made = pair(transport, [layout(num_blocks=4)], layout(num_blocks=8))
    for announced in (4, 2**32 - 1, -1):
        with pytest.raises(Incompatible, match="has 4 blocks") as caught:
            made.read([announced], [0], [7])
        assert caught.value.retryable, "its source is at fault, not the request"
    with pytest.raises(InvalidRequest, match="byte"):
        made.read([0], [8])
    with pytest.raises(InvalidRequest, match="blocks"):
        made.read([0] * (MAX_BLOCKS + 1), [0] * (MAX_BLOCKS + 1), [100] * (MAX_BLOCKS + 1))
    assert made.read([], []) == 0


def test_shm_is_proven_else_tcp_is_taken(pair: Callable[..., Pair], layout: Make) -> None:
    both = [layout(heads=range(2)), layout(heads=range(2, 4))]
    made = pair("auto", both, layout(), connected=False)
    first, second = made.exports
    swapped = [first, replace(second, shm_socket=first.shm_socket)]
    away = [replace(first, host_id="elsewhere"), replace(second, shm_socket="@baton-nobody-listens-here")]
    for number, (exports, transport) in enumerate([(made.exports, "shm"), (swapped, "shm+tcp"), (away, "tcp")]):
        incarnation = bytes([number]) * 16
        peer = made.reader.connect(incarnation, exports, Deadline.after(SOON))
        assert peer.transport == transport and made.reader.connect(incarnation, exports, Deadline.after(SOON)) is peer
        made.target[:] = bytes(len(made.target))
        assert made.reader.read(incarnation, [1], [101], [2], Deadline.after(SOON)).wait(Deadline.after(SOON))
        made.check([1], [2])
        made.reader.forget(incarnation)


def test_a_way_that_is_demanded_is_not_replaced(pair: Callable[..., Pair], layout: Make) -> None:
    made = pair("shm", [layout()], layout(), connected=False)
    (export,) = made.exports
    for changed, error in [
        (replace(export, shm_socket="@baton-nobody-listens-here"), Unavailable),
        (replace(export, nonce=bytes(16)), Incompatible),
        (replace(export, pool_bytes=7), Incompatible),
        (replace(export, layout=layout(part_dims=(2, 2)), pool_bytes=layout(part_dims=(2, 2)).nbytes), Incompatible),
    ]:
        with pytest.raises(error):
            made.reader.connect(A, [changed], Deadline.after(SOON))
    with pytest.raises(Incompatible):
        made.reader.connect(A, [replace(export, layout=layout(num_blocks=7), pool_bytes=layout(num_blocks=7).nbytes)], Deadline.after(SOON))


@pytest.mark.parametrize(("transport", "change"), [("tcp", {"tcp_address": ""}), ("loopback", {"nonce": bytes(16)})])
def test_a_way_that_does_not_exist_is_unavailable(pair: Callable[..., Pair], layout: Make, transport: Transport, change: dict) -> None:
    made = pair(transport, [layout()], layout(), connected=False)
    with pytest.raises(Unavailable):
        made.reader.connect(A, [replace(made.exports[0], **change)], Deadline.after(SOON))


def test_two_nodes_on_one_host_do_not_meet(pair: Callable[..., Pair], layout: Make) -> None:
    one, other = (pair("shm", [layout()], layout()) for _ in range(2))
    other.pools[0].data[:] = bytes(len(other.pools[0].data))
    assert one.read([1], [1]) and other.read([1], [1])
    one.check([1], [1])
    other.check([1], [1])
    with pytest.raises(Incompatible):
        one.reader.connect(b"x" * 16, [replace(other.exports[0], shm_socket=one.exports[0].shm_socket)], Deadline.after(SOON))


def test_a_closed_thread_refuses_reads_and_sources(pair: Callable[..., Pair], layout: Make) -> None:
    made = pair("tcp", [layout()], layout())
    made.threads[1].close()
    with pytest.raises(BatonError):
        made.reader.read(A, [1], [101], [1], Deadline.after(SOON)).wait(Deadline.after(SOON))
    made.threads[0].close()
    with pytest.raises(Unavailable):
        SourceRank(made.threads[0], made.pools[0], made.layouts[0])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("way", [move, move_by_python])
def test_moves_of_any_pattern_equal_one_by_one(seed: int, way: Callable[[Spans, memoryview, memoryview], None]) -> None:
    """The compiled loop, and Python's, which copies regular stretches as strided arrays: same result as one span after the other."""
    rng = np.random.default_rng(seed)
    source = rng.bytes(1 << 16)
    starts, targets, sizes, at = [], [], [], 0
    while at < 60000:
        count, size = int(rng.integers(1, 9)), int(rng.integers(1, 60))
        gap, step, start = int(rng.integers(0, 5)), int(rng.integers(-70, 70)), int(rng.integers(1000, 60000))
        for number in range(count):
            starts.append(start + number * step)
            targets.append(at)
            sizes.append(size)
            at += size + gap
    target, wanted = bytearray(1 << 16), bytearray(1 << 16)
    for start, to, size in zip(starts, targets, sizes, strict=True):
        wanted[to : to + size] = source[start : start + size]
    way(Spans(np.array(starts), np.array(targets), np.array(sizes)), memoryview(source), memoryview(target))
    assert target == wanted


@given(st.lists(st.tuples(st.integers(1, 700_000), st.integers(0, 200)), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 70))
@settings(max_examples=50)
def test_large_moves_of_any_alignment_write_their_bytes_and_no_others(sizes: list[tuple[int, int]], start: int, shift: int) -> None:
    """Above a megabyte in all, spans are written past the caches, in whole lines: their ends are not."""
    gaps = np.cumsum([start, *(nbytes + gap for nbytes, gap in sizes)])
    spans = Spans(gaps[:-1], gaps[:-1] + shift, np.array([nbytes for nbytes, _ in sizes], np.int64))
    source = np.random.default_rng(len(sizes)).integers(1, 256, int(gaps[-1]), np.uint8)
    target, wanted = (np.zeros(len(source) + shift, np.uint8) for _ in range(2))
    for span in spans:
        wanted[span.target_offset : span.target_offset + span.nbytes] = source[span.source_offset : span.source_offset + span.nbytes]
    move(spans, memoryview(source), memoryview(target))
    assert (target == wanted).all()


@given(st.lists(st.tuples(st.integers(1, 3 * SLICE_BYTES), st.integers(0, 9)), max_size=8))
def test_slices_are_bounded_and_name_every_byte_once_and_in_order(sizes: list[tuple[int, int]]) -> None:
    starts = np.cumsum([0, *(nbytes + gap for nbytes, gap in sizes)])[:-1]
    whole = Spans(starts, starts + 7, np.array([nbytes for nbytes, _ in sizes], np.int64))
    portions = list(sliced(whole))
    assert all(portion.total_bytes <= SLICE_BYTES for portion in portions)
    parts = iter([part for portion in portions for part in portion])
    for span in whole:
        at = 0
        while at < span.nbytes:
            part = next(parts)
            assert (part.source_offset, part.target_offset) == (span.source_offset + at, span.target_offset + at)
            at += part.nbytes
        assert at == span.nbytes
    assert next(parts, None) is None
