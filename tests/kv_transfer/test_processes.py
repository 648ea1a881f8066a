"""Blocks between real processes: contents, refusals, and what a reader sees when the source process is killed or stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from baton.deadline import Deadline
from baton.errors import DeadlineExceeded, LeaseLost, NodeLost, Unavailable
from kv_transfer.choose import Transport
from kv_transfer.layout import KVLayout
from kv_transfer.pool import map_readonly
from kv_transfer.reader import Reader
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export, Ticket
from tests.kv_transfer.source_process import FIRST

SOON = 20.0
A = b"a" * 16
SCRIPT = Path(__file__).with_name("source_process.py")
TRANSPORTS: tuple[Transport, ...] = ("shm", "tcp")
Make = Callable[..., KVLayout]


class SourceProcess:
    """A running source_process.py."""

    def __init__(self, layouts: list[KVLayout]) -> None:
        self.layouts = layouts
        command = [sys.executable, str(SCRIPT), json.dumps([asdict(layout) for layout in layouts])]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        facts = json.loads(self.stdout.readline())
        self.exports = [
            Export(**fact | {"nonce": bytes.fromhex(fact["nonce"]), "layout": layout}) for fact, layout in zip(facts, layouts, strict=True)
        ]
        self.data = [np.random.default_rng(rank).bytes(layout.nbytes) for rank, layout in enumerate(layouts)]

    def say(self, command: str, rank: int, block: int, number: int) -> None:
        self.stdin.write(f"{command} {rank} {block} {number}\n")
        self.stdin.flush()
        assert self.stdout.readline() == "ok\n"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait(SOON)
        elif number is signal.SIGSTOP:
            os.waitpid(self.process.pid, os.WUNTRACED)  # all its threads stand still

    def close(self) -> int:
        self.stdin.close()
        self.stdout.close()
        return self.process.wait(SOON)


@pytest.fixture
def sources(no_leaks: None, layout: Make) -> Iterator[SourceProcess]:
    """Two ranks that split the heads, 64 blocks of 24 KiB each."""
    made = SourceProcess([layout(num_blocks=64, heads=heads, part_dims=(256, 256)) for heads in (range(2), range(2, 4))])
    yield made
    if made.process.poll() is None:
        made.signal(signal.SIGCONT)
    code = made.close()
    assert code in (0, -signal.SIGKILL)


class TargetRank:
    """A reader, its thread and the buffer it fills."""

    def __init__(self, layout: KVLayout, transport: Transport, index: int = 0) -> None:
        self.layout = layout
        self.thread = TransferThread()
        self.buffer = bytearray(layout.nbytes)
        self.reader = Reader(self.thread, memoryview(self.buffer), layout, transport=transport, earlier=[layout] * index)

    def read(self, source_blocks: list[int], target_blocks: list[int], seconds: float = SOON) -> int:
        generations = [100 + block for block in source_blocks]
        return self.reader.read(A, source_blocks, generations, target_blocks, Deadline.after(seconds)).wait(Deadline.after(SOON))

    def piece(self, block: int, layer: int, part: int, head: int) -> bytes:
        at = self.layout.offset(block, layer, part, head)
        return bytes(self.buffer[at : at + self.layout.piece_bytes(part)])


@pytest.fixture
def target(sources: SourceProcess, layout: Make) -> Iterator[Callable[..., TargetRank]]:
    made: list[TargetRank] = []

    def make(transport: Transport, heads: range = range(4), connected: bool = True) -> TargetRank:
        made.append(TargetRank(layout(num_blocks=48, heads=heads, part_dims=(256, 256)), transport, len(made)))
        if connected:
            assert made[-1].reader.connect(A, sources.exports, Deadline.after(SOON)).transport == transport
        return made[-1]

    yield make
    while made:
        made.pop().thread.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("split", [[range(4), range(4)], [range(3), range(3, 4)]])
def test_two_ranks_to_two_ranks(
    sources: SourceProcess, target: Callable[..., TargetRank], transport: Transport, split: list[range]
) -> None:
    order = np.random.default_rng(3)
    source_blocks, target_blocks = order.permutation(64)[:40].tolist(), order.permutation(48)[:40].tolist()
    for rank in [target(transport, heads) for heads in split]:
        assert rank.read(source_blocks, target_blocks) == 40 * rank.layout.block_bytes
        for source_block, target_block in zip(source_blocks, target_blocks, strict=True):
            for layer, part, head in ((layer, part, head) for layer in range(3) for part in range(2) for head in rank.layout.heads):
                owner = head // 2
                at = sources.layouts[owner].offset(source_block, layer, part, head)
                assert rank.piece(target_block, layer, part, head) == sources.data[owner][at : at + rank.layout.piece_bytes(part)]
        untouched = set(range(48)) - set(target_blocks)
        assert not any(any(rank.piece(block, 0, 0, rank.layout.head_start)) for block in untouched)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_stale_rank_of_two_refuses_the_read(sources: SourceProcess, target: Callable[..., TargetRank], transport: Transport) -> None:
    rank = target(transport)
    assert rank.read([5], [0])
    sources.say("stamp", 1, 5, 7)
    with pytest.raises(LeaseLost, match="other content"):
        rank.read([5], [0])
    assert rank.read([6], [0])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_source_is_a_lost_node_at_once(sources: SourceProcess, target: Callable[..., TargetRank], transport: Transport) -> None:
    """For shm, too, whose memory still reads fine: the kernel has closed the life line."""
    rank = target(transport)
    assert rank.read([5], [0])
    sources.signal(signal.SIGKILL)
    for _ in range(3):
        with pytest.raises(NodeLost):
            rank.read([5], [0])
    assert "memfd:baton-kv" not in Path("/proc/self/maps").read_text(), "its memory is not kept"
    with pytest.raises(Unavailable):
        target("shm", connected=False).reader.connect(A, sources.exports, Deadline.after(SOON))


def test_a_source_killed_during_a_read_fails_it(sources: SourceProcess, target: Callable[..., TargetRank]) -> None:
    rank = target("tcp")
    sources.signal(signal.SIGSTOP)  # so that the read certainly is under way
    ticket = rank.reader.read(A, [5], [105], [0], Deadline.after(SOON))
    rank.thread.run(lambda: None, Deadline.after(SOON))
    assert not ticket.quiesced
    sources.signal(signal.SIGKILL)
    with pytest.raises(NodeLost):
        ticket.wait(Deadline.after(SOON))


@pytest.fixture
def large(no_leaks: None, layout: Make) -> Iterator[tuple[SourceProcess, Callable[[Callable[[], None]], Ticket]]]:
    """A source with 24 blocks of 1.5 MiB, and a read of half of them over shared memory, between two slices of which something happens."""
    sizes = layout(num_blocks=24, part_dims=(256, 256), block_size=64)
    source = SourceProcess([sizes])
    rank = TargetRank(sizes, "shm")
    assert rank.reader.connect(A, source.exports, Deadline.after(SOON)).transport == "shm"

    def read(meanwhile: Callable[[], None]) -> Ticket:
        def between() -> Iterator[None]:
            meanwhile()
            yield

        def start() -> Ticket:
            ticket = rank.reader.read(A, range(0, 24, 2), range(100, 124, 2), range(0, 24, 2), Deadline.after(SOON))
            rank.thread.post(lambda: rank.thread.work(between()))  # behind the first slice
            return ticket

        return rank.thread.run(start, Deadline.after(SOON))

    yield source, read
    rank.thread.close()
    source.close()


def test_a_source_killed_between_two_slices_of_a_shared_read_fails_it(
    large: tuple[SourceProcess, Callable[[Callable[[], None]], Ticket]],
) -> None:
    """Its memory still reads fine, and holds what was announced: that it is dead is told by the life line alone."""
    source, read = large
    with pytest.raises(NodeLost):
        read(lambda: source.signal(signal.SIGKILL)).wait(Deadline.after(SOON))


def test_a_block_reused_between_two_slices_of_a_shared_read_fails_it(
    large: tuple[SourceProcess, Callable[[Callable[[], None]], Ticket]],
) -> None:
    """Whether it was copied before or after: nobody knows."""
    source, read = large
    for block in (22, 0):
        with pytest.raises(LeaseLost, match=f"block {block} holds other content"):
            read(lambda block=block: source.say("reuse", 0, block, 7)).wait(Deadline.after(SOON))
        source.say("stamp", 0, block, 100 + block)


def test_a_block_that_is_reused_all_the_time_is_read_right_or_not_at_all(sources: SourceProcess, target: Callable[..., TargetRank]) -> None:
    """Torn reads are refused: what is accepted is the content of the generation that was asked for, and all of it."""
    rank = target("shm", range(2))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect("\0" + sources.exports[0].shm_socket[1:])
        line.send(sources.exports[0].nonce)
        view = map_readonly(socket.recv_fds(line, 1, 1)[1][0])
        sources.say("scribble", 0, 5, 2000)
        complete = accepted = refused = 0
        while complete < FIRST + 1999:
            complete = int(view.generations[6])
            ticket = rank.reader.read(A, [5], [complete], [3], Deadline.after(SOON))
            try:
                ticket.wait(Deadline.after(SOON))
            except LeaseLost:
                refused += 1
                continue
            at = 3 * rank.layout.block_bytes
            assert set(rank.buffer[at : at + rank.layout.block_bytes]) == {complete % 251}
            accepted += 1
        del view
    assert accepted


def test_a_stopped_source_is_seen_by_deadlines_only(sources: SourceProcess, target: Callable[..., TargetRank]) -> None:
    """tcp waits, so the deadline ends the read; shared memory is still right, so the read succeeds: heartbeats judge the process."""
    over_tcp, over_shm = target("tcp"), target("shm")
    sources.signal(signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        over_tcp.read([5], [0], seconds=0.1)
    assert over_shm.read([5], [0])
    piece = sources.layouts[1].offset(5, 0, 0, 3)
    assert over_shm.piece(0, 0, 0, 3) == sources.data[1][piece : piece + over_shm.layout.piece_bytes(0)]
    sources.signal(signal.SIGCONT)
    assert over_tcp.read([5], [0])


def test_a_source_that_ends_leaves_nothing(sources: SourceProcess) -> None:
    assert sources.close() == 0
    listed = Path("/proc/net/unix").read_text()
    assert not any(export.shm_socket in listed for export in sources.exports)
