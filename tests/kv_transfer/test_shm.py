"""The door of a shared pool: only who knows its nonce gets the memory, and nobody can hold the door open for nothing."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from baton.deadline import Deadline
from baton.errors import Incompatible
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
def test_a_wrong_nonce_gets_nothing(dial: Callable[[], socket.socket], hello: bytes) -> None:
    line = dial()
    line.send(hello)
    assert socket.recv_fds(line, 1, 1)[:2] == (b"", [])


@pytest.mark.parametrize("limits", [{"hello_s": 0.05}])
def test_silence_is_given_up(dial: Callable[[], socket.socket]) -> None:
    assert dial().recv(1) == b""


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
