"""The door of a shared pool: only who knows its nonce gets the memory, and nobody can hold the door open for nothing."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.deadline import Deadline
from baton.errors import Incompatible, Unavailable
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.shm import ShmDestination, ShmSource
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export

SOON = 10.0


@pytest.fixture
def limits() -> dict[str, float]:
    """Other limits of the source than its own, for tests that say so."""
    return {}


@pytest.fixture
def shared(pool: Callable[..., Pool]) -> Pool:
    return pool()


@pytest.fixture
def source(thread: TransferThread, shared: Pool, limits: dict[str, float]) -> Iterator[ShmSource]:
    made = thread.run(lambda: ShmSource(thread, shared, **limits), Deadline.after(SOON))
    yield made
    thread.run(made.close, Deadline.after(SOON))


@pytest.fixture
def dial(source: ShmSource) -> Iterator[Callable[[], socket.socket]]:
    lines: list[socket.socket] = []

    def connect() -> socket.socket:
        lines.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        lines[-1].settimeout(SOON)
        lines[-1].connect("\0" + source.address[1:])
        return lines[-1]

    yield connect
    for line in lines:
        line.close()


@pytest.mark.parametrize("hello", [b"", b"x", bytes(16), bytes(17)])
def test_a_wrong_nonce_gets_nothing(dial: Callable[[], socket.socket], source: ShmSource, hello: bytes) -> None:
    line = dial()
    line.send(hello)
    assert socket.recv_fds(line, 1, 1)[:2] == (b"", [])
    assert source.refusals.counts == {"nonce": 1}


@pytest.mark.parametrize("limits", [{"hello_s": 0.05}])
def test_silence_is_given_up(dial: Callable[[], socket.socket], source: ShmSource) -> None:
    assert dial().recv(1) == b""
    assert source.refusals.counts == {"late": 1}


def test_descriptors_of_a_reader_go_nowhere(dial: Callable[[], socket.socket], shared: Pool, source: ShmSource, no_leaks: None) -> None:
    line = dial()
    with open(os.devnull, "rb") as gift:
        socket.send_fds(line, [shared.nonce], [gift.fileno()] * 200)
    _, fds, _, _ = socket.recv_fds(line, 1, 1)
    os.close(fds[0])
    line.close()


@pytest.mark.parametrize("answer", [b"\1", b"\0", b"\1\1", b"", None])
@pytest.mark.parametrize("num_fds", [0, 1, 2, 100])
def test_a_door_that_hands_over_something_else(
    thread: TransferThread, layout: Callable[..., KVLayout], answer: bytes | None, num_fds: int, no_leaks: None
) -> None:
    """No descriptor, several, or none of a pool; or the line breaks half-way. None is kept."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind("")  # any free abstract name
        door.listen(1)
        name = door.getsockname()[1:].decode()
        export = Export(0, layout(), "", f"@{name}", "", bytes(16), 1)
        with ThreadPoolExecutor(1) as other:
            reading = other.submit(ShmDestination.connect, thread, export, memoryview(b""), Deadline.after(SOON))
            line, _ = door.accept()
            with line, open(os.devnull, "rb") as gift:
                line.settimeout(SOON)
                assert line.recv(99) == bytes(16)
                if answer is not None:
                    socket.send_fds(line, [answer], [gift.fileno()] * num_fds)
            with pytest.raises((Incompatible, Unavailable)):
                reading.result(SOON)


@pytest.mark.parametrize("limits", [{"max_lines": 1}])
def test_too_many_lines_are_closed_at_once(dial: Callable[[], socket.socket], shared: Pool) -> None:
    first = dial()
    first.send(shared.nonce)
    _, fds, _, _ = socket.recv_fds(first, 1, 1)
    assert len(fds) == 1 and dial().recv(1) == b""
    os.close(fds[0])


def test_a_reader_that_says_more_is_dropped(dial: Callable[[], socket.socket], shared: Pool, source: ShmSource) -> None:
    line = dial()
    line.send(shared.nonce)
    line.recv(1)
    line.send(b"more")
    with contextlib.suppress(ConnectionResetError):
        assert line.recv(1) == b""


def test_a_door_of_another_pool_is_not_taken_for_this_one(
    thread: TransferThread, source: ShmSource, shared: Pool, layout: Callable[..., KVLayout]
) -> None:
    """The nonce may be right and the size wrong, or the answer come from somebody else altogether."""
    wrong = Export(0, layout(), "", source.address, "", shared.nonce, len(shared.data) + 1)
    with pytest.raises(Incompatible, match="another pool"):
        ShmDestination.connect(thread, wrong, memoryview(b""), Deadline.after(SOON))
