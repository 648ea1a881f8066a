"""The tcp transport against peers that are slow, silent, malicious or dead: raw sockets play the other end."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Incompatible, InvalidRequest, LeaseLost, NodeLost, Unavailable
from kv_transfer import tcp_frame
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.tcp import MIN_LANE_BYTES, TcpDestination
from kv_transfer.tcp_frame import REPLY, REQUEST, TRAILER, Request, RequestHeader, Status
from kv_transfer.tcp_socket import Iovec
from kv_transfer.tcp_source import TcpSource
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Check, Export, Span, Spans, Ticket

SOON = 10.0
NO_CHECK = Check.of([], [])


@pytest.fixture
def limits() -> dict[str, float]:
    """Other limits of the source than its own, for tests that say so."""
    return {}


@pytest.fixture
def source(thread: TransferThread, pool: Callable[..., Pool], limits: dict[str, float]) -> Iterator[TcpSource]:
    made = thread.run(lambda: TcpSource(thread, pool(64, 65536), **limits), Deadline.after(SOON))
    yield made
    thread.run(made.close, Deadline.after(SOON))


@pytest.fixture
def raw(source: TcpSource) -> Iterator[socket.socket]:
    host, port = source.address.split(":")
    with socket.create_connection((host, int(port)), timeout=SOON) as sock:
        yield sock


def received(sock: socket.socket, nbytes: int) -> bytes:
    with sock.makefile("rb", buffering=0) as stream:
        parts = b""
        while len(parts) < nbytes:
            part = stream.read(nbytes - len(parts))
            assert part, "closed early"
            parts += part
        return parts


def request(source: TcpSource, spans: list[tuple[int, int]], blocks: tuple[int, ...] = (), generations: tuple[int, ...] = ()) -> bytes:
    table = np.array(spans, np.int64).reshape(-1, 2)
    return Request(source.nonce, table[:, 0], table[:, 1], Check.of(blocks, generations)).pack()


def status_of(reply: bytes) -> Status:
    return Status(REPLY.unpack(reply)[2])


def test_a_raw_request_is_answered_again_and_again(source: TcpSource, raw: socket.socket) -> None:
    for at, nbytes in ((0, 10), (65536 * 63, 65536), (0, 64 * 65536)):
        raw.sendall(request(source, [(at, nbytes)], (1,), (101,)))
        assert status_of(received(raw, REPLY.size)) is Status.OK
        assert received(raw, nbytes) == source.view.data[at : at + nbytes]
        assert tcp_frame.unpack_trailer(received(raw, TRAILER.size)) is Status.OK
    assert source.counts.reads == 3 and source.counts.connections == 1


@pytest.mark.parametrize("span", [(-1, 5), (0, 0), (0, -5), (64 * 65536, 1), (1, 64 * 65536), (2**62, 2**62)])
def test_spans_outside_of_the_pool_are_refused(source: TcpSource, raw: socket.socket, span: tuple[int, int]) -> None:
    raw.sendall(request(source, [span]))
    assert status_of(received(raw, REPLY.size)) is Status.BAD_SPAN
    raw.sendall(request(source, [(0, 5)]))
    assert status_of(received(raw, REPLY.size)) is Status.OK


def test_more_than_the_pool_is_refused(source: TcpSource, raw: socket.socket) -> None:
    raw.sendall(request(source, [(0, 64 * 65536), (0, 1)]))
    assert status_of(received(raw, REPLY.size)) is Status.BAD_SPAN


def test_a_change_while_the_bytes_are_sent_shows_in_the_trailer(source: TcpSource, raw: socket.socket) -> None:
    """The reader takes nothing until the block has changed: the pool is larger than all socket buffers between them."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    raw.sendall(request(source, [(0, 64 * 65536)], (1,), (101,)))
    assert status_of(received(raw, REPLY.size)) is Status.OK
    source.view.generations[1] = 7
    received(raw, 64 * 65536)
    assert tcp_frame.unpack_trailer(received(raw, TRAILER.size)) is Status.STALE
    raw.sendall(request(source, [(0, 5)], (1,), (101,)))
    assert status_of(received(raw, REPLY.size)) is Status.STALE
    assert source.counts.stale_reads == 2


@pytest.mark.parametrize(
    "frame",
    [
        bytes(REQUEST.size),
        REQUEST.pack(b"HTTP", 1, 0, bytes(16), 1, 1),
        REQUEST.pack(tcp_frame.MAGIC, 2, 0, bytes(16), 1, 1),
        REQUEST.pack(tcp_frame.MAGIC, 1, 1, bytes(16), 1, 1),
        REQUEST.pack(tcp_frame.MAGIC, 1, 0, bytes(16), 1, 1),
        REQUEST.pack(tcp_frame.MAGIC, 1, 0, bytes(16), 0, 1),
        REQUEST.pack(tcp_frame.MAGIC, 1, 0, bytes(16), 2**31, 1),
        REQUEST.pack(tcp_frame.MAGIC, 1, 0, bytes(16), 1, 2**31),
    ],
)
def test_a_frame_that_makes_no_sense_ends_the_connection(source: TcpSource, raw: socket.socket, frame: bytes) -> None:
    raw.sendall(frame)
    assert raw.recv(1) == b""
    assert sum(source.refusals.counts.values()) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.one_of(st.binary(max_size=300), st.integers(1, 200)), cut=st.integers(0, 60))
def test_noise_breaks_nothing(source: TcpSource, noise: bytes | int, cut: int) -> None:
    """Random bytes, or a good frame of which one byte is wrong and the end is missing, closed at any point."""
    host, port = source.address.split(":")
    before = bytes(source.view.data[:64])
    frame = bytearray(noise if isinstance(noise, bytes) else request(source, [(0, 5)] * 8, (1,), (101,)))
    if isinstance(noise, int):
        frame[noise % len(frame)] ^= 1 + noise % 255
    with socket.create_connection((host, int(port)), timeout=SOON) as sock:
        sock.sendall(frame[: len(frame) - cut])
    with socket.create_connection((host, int(port)), timeout=SOON) as sock:
        sock.sendall(request(source, [(0, 64)]))
        assert status_of(received(sock, REPLY.size)) is Status.OK and received(sock, 64) == before
    assert source.thread.failure is None


@pytest.mark.parametrize("limits", [{"max_connections": 1}])
def test_too_many_connections_are_closed_at_once(source: TcpSource) -> None:
    host, port = source.address.split(":")
    with socket.create_connection((host, int(port)), timeout=SOON) as first:
        first.sendall(request(source, [(0, 5)]))
        assert status_of(received(first, REPLY.size)) is Status.OK
        with socket.create_connection((host, int(port)), timeout=SOON) as second:
            assert second.recv(1) == b""


@pytest.mark.parametrize("limits", [{"frame_s": 0.05}])
@pytest.mark.parametrize("begun", [0, 1, REQUEST.size, REQUEST.size + 1])
def test_a_frame_that_does_not_end_is_given_up(source: TcpSource, raw: socket.socket, begun: int) -> None:
    raw.sendall(request(source, [(0, 5)])[:begun])
    assert raw.recv(1) == b""


@pytest.mark.parametrize("limits", [{"stall_s": 0.05}])
def test_a_reader_that_takes_nothing_is_given_up(source: TcpSource, raw: socket.socket) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    raw.sendall(request(source, [(0, 64 * 65536)]))
    received_nothing = threading.Event()
    while not source.refusals.counts["stalled"]:
        received_nothing.wait(0.01)
    assert source.counts.bytes_sent < 64 * 65536


@pytest.mark.parametrize("limits", [{"stall_s": 5.0, "answer_s": 0.2}])
def test_a_reader_that_takes_a_little_now_and_then_is_given_up_as_well(source: TcpSource, raw: socket.socket) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.sendall(request(source, [(0, 64 * 65536)]))
    pause = threading.Event()
    while not source.refusals.counts:
        assert raw.recv(10)
        pause.wait(0.01)
    assert source.refusals.counts == {"slow": 1} and source.counts.bytes_sent < 64 * 65536


def test_a_source_is_looked_for_only_where_a_number_says(thread: TransferThread, layout: Callable[..., KVLayout]) -> None:
    for address in ("", ":5", "localhost:5", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:\u0664", "a" * 100 + ":5", "\0:1"):
        export = Export(0, layout(), "", "", address, b"n" * 16, layout().nbytes)
        with pytest.raises(Unavailable, match="no tcp address"):
            TcpDestination.connect(thread, export, memoryview(b""))


def test_an_export_that_cannot_be_is_refused(layout: Callable[..., KVLayout]) -> None:
    good = Export(0, layout(), "", "", "", b"n" * 16, layout().nbytes)
    for change in ({"nonce": b"n"}, {"tcp_address": "a" * 257}, {"host_id": "a" * 257}, {"pool_bytes": 2**63}, {"pool_bytes": -1}):
        with pytest.raises(Incompatible):
            replace(good, **change)


@pytest.mark.parametrize(("source", "target", "nbytes"), [(2**63 - 10, 0, 100), (0, 2**63 - 10, 100), (0, 0, 2**63 - 1), (91, 0, 10)])
def test_spans_whose_end_is_no_int64_are_outside_like_any_other(source: int, target: int, nbytes: int) -> None:
    with pytest.raises(InvalidRequest, match=f"ends at byte {max(source, target) + nbytes}"):
        Spans.of([Span(source, target, nbytes)]).check_within(100, 100)


class FakeSource:
    """A listening socket whose end of the conversation the test plays."""

    def __init__(self, layout: KVLayout) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(SOON)
        host, port = self.listener.getsockname()
        self.export = Export(0, layout, "", "", f"{host}:{port}", b"n" * 16, layout.nbytes)

    def request(self) -> tuple[socket.socket, Request]:
        sock, _ = self.listener.accept()
        sock.settimeout(SOON)
        return sock, self.next_request(sock)

    def next_request(self, sock: socket.socket) -> Request:
        header = RequestHeader.unpack(received(sock, REQUEST.size))
        return header.request(received(sock, header.body_bytes))


@pytest.fixture
def fake(layout: Callable[..., KVLayout]) -> Iterator[FakeSource]:
    made = FakeSource(layout(num_blocks=1024))
    yield made
    made.listener.close()


class Target:
    """A destination of the fake source and the buffer it fills."""

    def __init__(self, thread: TransferThread, export: Export) -> None:
        self.thread = thread
        self.buffer = bytearray(export.pool_bytes)
        self.destination = TcpDestination.connect(thread, export, memoryview(self.buffer))

    def read(self, *spans: Span, seconds: float = SOON) -> Ticket:
        ticket = self.thread.ticket()
        self.thread.post(lambda: self._start(Spans.of(spans), Deadline.after(seconds), ticket))
        return ticket

    def _start(self, spans: Spans, deadline: Deadline, ticket: Ticket) -> None:
        self.destination.read(spans, NO_CHECK, deadline, ticket)
        ticket.seal()


@pytest.fixture
def target(thread: TransferThread, fake: FakeSource) -> Iterator[Target]:
    made = Target(thread, fake.export)
    yield made
    thread.run(lambda: made.destination.close(Cancelled("end")), Deadline.after(SOON))


def test_an_answer_in_drips_arrives_whole(fake: FakeSource, target: Target) -> None:
    ticket = target.read(Span(0, 5, 7), Span(100, 20, 3))
    sock, asked = fake.request()
    assert asked.offsets.tolist() == [0, 100] and asked.nbytes.tolist() == [7, 3] and asked.nonce == b"n" * 16
    for byte in tcp_frame.pack_reply(Status.OK, 10) + b"abcdefgxyz" + tcp_frame.pack_trailer(Status.OK):
        sock.sendall(bytes([byte]))
    assert ticket.wait(Deadline.after(SOON)) == 10
    assert target.buffer[5:12] == b"abcdefg" and target.buffer[20:23] == b"xyz" and sum(map(bool, target.buffer)) == 10
    sock.close()


def test_a_large_read_uses_two_connections_and_a_second_read_the_same(fake: FakeSource, target: Target) -> None:
    size = 2 * MIN_LANE_BYTES
    socks: list[socket.socket] = []
    for turn in range(2):
        ticket = target.read(Span(0, 0, size))
        pairs = [(sock, fake.next_request(sock)) for sock in socks] or [fake.request() for _ in range(2)]
        socks = [sock for sock, _ in pairs]
        assert sorted((int(asked.offsets[0]), int(asked.nbytes[0])) for _, asked in pairs) == [(0, size // 2), (size // 2, size // 2)]
        for sock in socks:
            sock.sendall(tcp_frame.pack_reply(Status.OK, size // 2) + bytes([turn + 1]) * (size // 2) + tcp_frame.pack_trailer(Status.OK))
        assert ticket.wait(Deadline.after(SOON)) == size and target.buffer[:size] == bytes([turn + 1]) * size
    for sock in socks:
        sock.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (tcp_frame.pack_reply(Status.STALE, 5), LeaseLost),
        (tcp_frame.pack_reply(Status.BAD_SPAN, 5), InvalidRequest),
        (tcp_frame.pack_reply(Status.OK, 5) + b"abcde" + tcp_frame.pack_trailer(Status.STALE), LeaseLost),
        (tcp_frame.pack_reply(Status.OK, 4), Incompatible),
        (REPLY.pack(tcp_frame.MAGIC, 1, 77, 0), Incompatible),
        (b"HTTP/1.1 400 Bad", Incompatible),
        (tcp_frame.pack_reply(Status.OK, 5) + b"abcde" + b"nonsense", Incompatible),
    ],
)
def test_a_refusal_or_nonsense_fails_the_read_and_the_next_one_connects_anew(
    fake: FakeSource, target: Target, answer: bytes, kind: type[BatonError]
) -> None:
    ticket = target.read(Span(0, 0, 5))
    sock, _ = fake.request()
    sock.sendall(answer)
    with pytest.raises(kind):
        ticket.wait(Deadline.after(SOON))
    assert sock.recv(1) == b""
    sock.close()
    again = target.read(Span(0, 0, 5))
    sock, _ = fake.request()
    sock.sendall(tcp_frame.pack_reply(Status.OK, 5) + b"fghij" + tcp_frame.pack_trailer(Status.OK))
    assert again.wait(Deadline.after(SOON)) == 5 and target.buffer[:5] == b"fghij"
    sock.close()


@pytest.mark.parametrize("told", [b"", tcp_frame.pack_reply(Status.OK, 5) + b"ab"])
def test_a_source_that_falls_silent_holds_nobody_up(fake: FakeSource, target: Target, told: bytes) -> None:
    """Its read ends by abort, after which no byte can land; one that waited behind it goes on, over a new connection."""
    first = target.read(Span(0, 0, 5))
    sock, _ = fake.request()
    sock.sendall(told)
    others = [target.read(Span(0, 10, 5)) for _ in range(3)]
    assert not first.quiesced
    first.abort()
    with pytest.raises(Cancelled):
        first.wait(Deadline.after(SOON))
    before = bytes(target.buffer)
    with pytest.raises(OSError):
        for _ in range(100):
            sock.sendall(b"late")
            sock.recv(1)
    assert target.buffer == before
    for _ in others:
        fake_sock, _ = fake.request()
        fake_sock.close()
    for ticket in others:
        with pytest.raises(NodeLost):
            ticket.wait(Deadline.after(SOON))
    sock.close()


def test_a_silent_source_ends_the_read_at_its_deadline(fake: FakeSource, target: Target) -> None:
    late = [target.read(Span(0, 0, 5), seconds=0.05) for _ in range(4)]
    for ticket in late:
        with pytest.raises(DeadlineExceeded):
            ticket.wait(Deadline.after(SOON))


def test_an_idle_connection_that_ended_is_replaced(fake: FakeSource, target: Target, thread: TransferThread) -> None:
    answer = tcp_frame.pack_reply(Status.OK, 5) + b"abcde" + tcp_frame.pack_trailer(Status.OK)
    for _ in range(4):  # both lanes, twice
        ticket = target.read(Span(0, 0, 5))
        sock, _ = fake.request()
        sock.sendall(answer)
        assert ticket.wait(Deadline.after(SOON)) == 5
        sock.close()
        thread.run(lambda: None, Deadline.after(SOON))  # after a turn in which the thread saw it end


def test_nobody_listens(fake: FakeSource, target: Target) -> None:
    fake.listener.close()
    tickets = [target.read(Span(0, 0, 5)) for _ in range(2000)]
    for ticket in tickets:
        with pytest.raises(NodeLost):
            ticket.wait(Deadline.after(SOON))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 60))
def test_lanes_share_the_bytes_exactly(sizes: list[int], lanes: int, min_bytes: int) -> None:
    ends = np.cumsum(sizes)
    spans = Spans(ends * 3, ends * 7, np.array(sizes))
    shares = tcp_frame.split(spans, lanes, min_bytes)
    assert len(shares) <= lanes and (len(shares) == 1 or min(share.total_bytes for share in shares) >= min_bytes)
    assert [byte for share in shares for byte in every_byte(share)] == list(every_byte(spans))
    assert max(share.total_bytes for share in shares) - min(share.total_bytes for share in shares) <= len(shares)


def every_byte(spans: Spans) -> Iterator[tuple[int, int]]:
    return ((source + byte, target + byte) for source, target, nbytes in spans for byte in range(nbytes))


def test_a_read_of_very_many_spans_takes_several_frames() -> None:
    many = Spans.of([Span(2 * at, at, 1) for at in range(tcp_frame.MAX_SPANS + 1)])
    assert [len(part) for part in tcp_frame.chunked(many)] == [tcp_frame.MAX_SPANS, 1]


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=10), st.data())
def test_an_iovec_is_emptied_from_the_front(parts: list[bytes], data: st.DataObject) -> None:
    iovec, seen = Iovec([memoryview(part) for part in parts]), b""
    while iovec.left_bytes:
        window = b"".join(iovec.window())
        step = data.draw(st.integers(1, len(window)))
        seen += window[:step]
        iovec.advance(step)
    assert seen == b"".join(parts) and iovec.window() == []


def test_frames_are_what_they_say() -> None:
    assert REQUEST.size == struct.calcsize("<4sHH16sII") == 32 and (REPLY.size, TRAILER.size) == (16, 8)
    sent = Request(b"n" * 16, np.array([5]), np.array([7]), Check.of([1, 2], [3, 2**63]))
    raw = sent.pack()
    header = RequestHeader.unpack(raw[: REQUEST.size])
    got = header.request(raw[REQUEST.size :])
    assert header.body_bytes == len(raw) - REQUEST.size and got.nonce == sent.nonce and got.total_bytes == 7
    assert got.check.blocks.tolist() == [1, 2] and got.check.generations.tolist() == [3, 2**63]
