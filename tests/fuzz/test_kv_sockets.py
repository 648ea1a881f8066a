"""The sockets that carry KV blocks, against peers that say anything: both ends of tcp frames, both ends of the shared-memory hello.

Nothing outside of the bytes that a read may fill is ever written, the transfer thread lives on, and good readers are served afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled
from kv_transfer import pool as pool_memory
from kv_transfer.layout import AXES, KVLayout
from kv_transfer.pool import Pool
from kv_transfer.shm import ShmDestination, ShmSource
from kv_transfer.tcp import TcpDestination
from kv_transfer.tcp_frame import MAGIC, REPLY, REQUEST, TRAILER, VERSION, Request, Status, pack_reply, pack_trailer
from kv_transfer.tcp_source import TcpSource
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Check, Export, Span, Spans
from tests.fuzz.hostile import PATIENCE_S, effort, noise

NUM_BLOCKS, BLOCK_BYTES = 8, 512
LAYOUT = KVLayout(AXES, NUM_BLOCKS, 2, 0, 2, (8, 8), 0, 2, "float32", 2, 2)
WHERE, SIZE = 100, 64  # of the one span that readers here ask for
EDGES = [0, 1, 2**15, 2**16, 2**16 + 1, 2**31, 2**32 - 1]


def soon() -> Deadline:
    return Deadline.after(PATIENCE_S)


@pytest.fixture
def thread() -> Iterator[TransferThread]:
    made = TransferThread()
    yield made
    made.close()
    assert made.failure is None


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(NUM_BLOCKS, BLOCK_BYTES)
    made.data[:] = np.random.default_rng(0).bytes(len(made.data))
    made.generations[:] = np.arange(100, 100 + NUM_BLOCKS)
    yield made
    made.close()


@pytest.fixture
def tcp(thread: TransferThread, pool: Pool) -> Iterator[TcpSource]:
    made = thread.run(lambda: TcpSource(thread, pool, frame_s=0.2, stall_s=0.2), soon())
    yield made
    thread.run(made.close, soon())


@pytest.fixture
def shm(thread: TransferThread, pool: Pool) -> Iterator[ShmSource]:
    made = thread.run(lambda: ShmSource(thread, pool, hello_s=0.2), soon())
    yield made
    thread.run(made.close, soon())


def good_request(nonce: bytes) -> bytes:
    return Request(nonce, np.array([WHERE]), np.array([SIZE]), Check.of([1], [101])).pack()


def requests(nonce: bytes) -> st.SearchStrategy[bytes]:
    """A good one spoilt; or headers that lie about what follows; or spans and generations of any value."""
    edge, number = st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5000)
    headers = st.builds(REQUEST.pack, st.just(MAGIC), st.sampled_from([VERSION, 0, 9]), st.just(0), st.just(nonce), edge, edge)
    lying = st.builds(bytes.__add__, headers, st.binary(max_size=100))
    tables = st.lists(st.tuples(number, number), min_size=1, max_size=5), st.lists(st.tuples(number, st.integers(0, 2**64 - 1)), max_size=3)
    return noise(good_request(nonce)) | lying | st.builds(lambda spans, checks: _request(nonce, spans, checks), *tables)


def _request(nonce: bytes, spans: list[tuple[int, int]], checks: list[tuple[int, int]]) -> bytes:
    table = np.array(spans, np.int64).reshape(-1, 2)
    return Request(nonce, table[:, 0], table[:, 1], Check.of([block for block, _ in checks], [gen for _, gen in checks])).pack()


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or fewer if the other end hangs up."""
    received = b""
    while len(received) < nbytes and (part := sock.recv(nbytes - len(received))):
        received += part
    return received


def answers(address: str, raw: bytes, hang_up: bool) -> None:
    """Send these bytes and read what comes. Who says that nothing more will come is hung up on; others may be waited for."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(raw)
        if hang_up:
            with contextlib.suppress(OSError):  # it may have hung up first
                sock.shutdown(socket.SHUT_WR)
        else:
            sock.settimeout(0.3)
        with contextlib.suppress(*(() if hang_up else (TimeoutError,))):
            while sock.recv(65536):
                continue


@effort(6)
@given(data=st.data())
def test_a_tcp_source_takes_anything_and_goes_on(tcp: TcpSource, pool: Pool, data: st.DataObject) -> None:
    before = bytes(pool.data), pool.generations.tolist()
    batch = data.draw(st.lists(st.tuples(requests(tcp.nonce), st.booleans()), min_size=10, max_size=20))
    readers = [threading.Thread(target=answers, args=(tcp.address, *each)) for each in batch]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(PATIENCE_S)
    assert not any(reader.is_alive() for reader in readers), "a connection was kept open"
    host, _, port = tcp.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        sock.sendall(good_request(tcp.nonce))
        expected = pack_reply(Status.OK, SIZE) + before[0][WHERE : WHERE + SIZE] + pack_trailer(Status.OK)
        assert exactly(sock, len(expected)) == expected
    assert (bytes(pool.data), pool.generations.tolist()) == before


@pytest.fixture
def lying_source() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        yield listener


def replies() -> st.SearchStrategy[bytes]:
    good = pack_reply(Status.OK, SIZE) + b"k" * SIZE + pack_trailer(Status.OK)
    edge = st.sampled_from([*EDGES, SIZE, 2**63, 2**64 - 1])
    headers = st.builds(REPLY.pack, st.just(MAGIC), st.just(VERSION), st.sampled_from([0, 1, 2, 3, 65535]), edge)
    trailers = st.builds(TRAILER.pack, st.just(MAGIC), st.sampled_from([0, 1, 2, 3, 2**32 - 1]))
    return noise(good) | st.builds(lambda head, body, tail: head + body + tail, headers, st.binary(max_size=2 * SIZE), trailers)


@effort(60)
@given(reply=replies(), after=st.sampled_from(["hang up", "go on", "reset"]))
def test_a_tcp_reader_takes_anything_and_fills_nothing_else(
    thread: TransferThread, lying_source: socket.socket, reply: bytes, after: str
) -> None:
    host, port = lying_source.getsockname()
    target = bytearray(LAYOUT.nbytes)
    export = Export(0, LAYOUT, "", "", f"{host}:{port}", bytes(16), LAYOUT.nbytes)
    destination = TcpDestination.connect(thread, export, memoryview(target))
    ticket = thread.ticket()

    def start() -> None:
        destination.read(Spans.of([Span(0, WHERE, SIZE)]), Check.of([], []), Deadline.after(0.3), ticket)
        ticket.seal()

    thread.post(start)
    source, _ = lying_source.accept()
    with source, contextlib.suppress(ConnectionError):
        source.settimeout(PATIENCE_S)
        exactly(source, REQUEST.size + 16)
        source.sendall(reply)
        if after == "reset":
            source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if after != "go on":
            source.close()
        with contextlib.suppress(BatonError):
            assert ticket.wait(soon()) == SIZE and bytes(target[WHERE : WHERE + SIZE]) == reply[REPLY.size :][:SIZE]
        assert ticket.quiesced
    thread.run(lambda: destination.close(Cancelled("end")), soon())
    assert not any(target[:WHERE]) and not any(target[WHERE + SIZE :])


@effort(5)
@given(data=st.data())
def test_a_shared_pool_is_handed_to_nobody_who_does_not_know_it(
    shm: ShmSource, thread: TransferThread, pool: Pool, data: st.DataObject
) -> None:
    hello = noise(pool.nonce).filter(lambda said: said != pool.nonce and not said.startswith(pool.nonce))
    batch = data.draw(st.lists(st.lists(hello, max_size=3), min_size=10, max_size=20))
    lines = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in batch]
    for line, words in zip(lines, batch, strict=True):
        line.settimeout(PATIENCE_S)
        line.connect("\0" + shm.address[1:])
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            for word in words:
                line.send(word)
    for line in lines:
        with contextlib.suppress(ConnectionError):
            assert socket.recv_fds(line, 1, 8)[:2] == (b"", [])
        line.close()
    good = Export(0, LAYOUT, "", shm.address, "", pool.nonce, len(pool.data))
    reader = ShmDestination.connect(thread, good, memoryview(bytearray(8)), soon())
    thread.run(lambda: reader.close(Cancelled("end")), soon())


@effort(40)
@given(
    answer=st.just(b"\1") | st.binary(max_size=3),
    sealed=st.booleans(),
    start=st.sampled_from([b"", pool_memory.MAGIC + bytes(32)]),
    content=st.binary(max_size=40),
    offsets=st.lists(st.sampled_from([0, 1, 64, 4096, LAYOUT.nbytes, 2**63]), max_size=5),
    size=st.sampled_from([0, LAYOUT.nbytes, 65536]),
)
def test_a_reader_is_not_fooled_by_what_a_shared_pool_claims_to_be(
    thread: TransferThread, answer: bytes, sealed: bool, start: bytes, content: bytes, offsets: list[int], size: int
) -> None:
    """Any answer, any memory behind it; the reader raises one of our errors and keeps no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind("")
        door.listen(1)
        export = Export(0, LAYOUT, "", "@" + door.getsockname()[1:].decode(), "", bytes(16), LAYOUT.nbytes)
        failures: list[BaseException] = []

        def read() -> None:
            try:
                ShmDestination.connect(thread, export, memoryview(b""), soon())
            except BaseException as error:  # looked at below, on the thread that tests
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        line, _ = door.accept()
        memory = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        os.write(memory, start + content + b"".join(offset.to_bytes(8, "little") for offset in offsets) + bytes(size))
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK if sealed else 0)
        with line:
            line.recv(16)
            socket.send_fds(line, [answer], [memory])
        os.close(memory)
        reader.join(PATIENCE_S)
    assert len(failures) == 1 and isinstance(failures[0], BatonError), failures
    failures.clear()  # an error holds the frames it came through, and they what had been mapped
    assert len(os.listdir("/proc/self/fd")) <= before
