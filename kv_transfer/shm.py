"""Reads between processes of one host: the source hands its memfd over a Unix socket, the destination maps it read-only and copies.

The socket lives in the abstract namespace under a random name, so nothing is left on disk and two clusters never meet. A reader shows
the pool's nonce (it came over gRPC) and gets a descriptor that cannot be written through. The connection stays open as a life line:
stale memory of a dead process reads fine for ever, but its kernel closes the line at once, and a line at its end fails every later read.
A process that is stopped, not dead, is left to the heartbeats: its memory is still right.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import struct
from functools import partial
from typing import Self

from baton.deadline import Deadline
from baton.errors import BatonError, Incompatible, NodeLost, Unavailable
from baton.telemetry import Refusals
from kv_transfer.listener import Listener
from kv_transfer.memory import MemoryReads
from kv_transfer.pool import Pool, View, map_readonly
from kv_transfer.thread import READ, Timer, TransferThread
from kv_transfer.transport import NONCE_BYTES, Check, Export, Spans, Ticket

log = logging.getLogger(__name__)

HELLO_S = 2.0
_ACCEPTED = b"\1"
_PEER_CREDENTIALS = struct.Struct("3i")


class ShmSource:
    """Hands out a shared pool's memfd. Lives on the transfer thread; `close` ends it and every life line.

    A line is made by a reader's connect and ends when the reader closes it, shows a wrong nonce or none within hello_s, or with us.
    At most max_lines; more, and those of other users, are closed at once.
    """

    def __init__(self, thread: TransferThread, pool: Pool, *, max_lines: int = 1024, hello_s: float = HELLO_S) -> None:
        assert pool.shared
        self.refusals = Refusals("kv shm", log)
        self._max_lines = max_lines
        self._hello_s = hello_s
        self._thread = thread
        self._pool = pool
        self._lines: dict[socket.socket, Timer] = {}  # the timer ends a line that stays silent
        self._name = f"baton-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.bind(f"\0{self._name}")
        sock.listen(64)
        self._listener = Listener(thread, sock, self._accept)

    @property
    def address(self) -> str:
        """The socket's abstract name, with "@" in the place of its zero byte."""
        return f"@{self._name}"

    def close(self) -> None:
        """Close the listener and all life lines: readers fail from now on."""
        self._listener.close()
        for line in tuple(self._lines):
            self._drop(line)

    def _accept(self, sock: socket.socket) -> None:
        if len(self._lines) >= self._max_lines or _peer_uid(sock) != os.getuid():
            self.refusals.add("lines", f"{len(self._lines)} are open, or it is another user's")
            sock.close()
            return
        sock.setblocking(False)
        self._lines[sock] = self._thread.at(Deadline.after(self._hello_s), lambda: self._refuse(sock, "late"))
        self._thread.watch(sock, READ, lambda _: self._hello(sock))

    def _hello(self, sock: socket.socket) -> None:
        """The nonce is answered with the memfd; anything else, the end included, ends the line."""
        if not hmac.compare_digest(_received(sock), self._pool.nonce):
            self._refuse(sock, "nonce")
            return
        if not self._hand_over(sock):
            self._drop(sock)
            return
        self._lines[sock].cancel()
        self._thread.watch(sock, READ, lambda _: self._drop(sock))

    def _hand_over(self, sock: socket.socket) -> bool:
        try:
            fd = self._pool.readonly_fd()
        except OSError:
            return False  # no descriptors left: this reader tries again or takes tcp
        try:
            socket.send_fds(sock, [_ACCEPTED], [fd])
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        self.refusals.add(reason)
        self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        timer = self._lines.pop(sock, None)
        if timer is not None:
            timer.cancel()
            self._thread.unwatch(sock)
            sock.close()


class ShmDestination:
    """Reads one export through a read-only mapping. Ends by `close` or with the source, which frees mapping and life line: the memory
    of a dead process must not be kept by those who read it."""

    name = "shm"

    def __init__(self, thread: TransferThread, line: socket.socket, view: View, export: Export, target: memoryview) -> None:
        self._thread = thread
        self._line = line
        # No reference back to this object: the mapping has to go with the last reference, not with the next garbage collection.
        self._reads = MemoryReads(thread, view, export.nonce, target, partial(_lost, line, export.rank))
        thread.post(lambda: self._begin(export.rank))

    @classmethod
    def connect(cls, thread: TransferThread, export: Export, target: memoryview, deadline: Deadline) -> Self:
        """Map the export's pool and prove that it is the one. Blocks: not for the loop or the transfer thread.

        Raises Unavailable if the socket cannot be reached from here (another host or network namespace, a dead owner), Incompatible if
        what lies behind it is another pool.
        """
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            view = _mapped(line, export, deadline.sooner(HELLO_S))
        except BaseException:
            line.close()
            raise
        line.setblocking(False)
        return cls(thread, line, view, export, target)

    def read(self, spans: Spans, check: Check, deadline: Deadline, ticket: Ticket) -> None:
        """See Destination."""
        self._reads.read(spans, check, deadline, ticket)

    def close(self, error: BatonError) -> None:
        """See Destination."""
        self._reads.close(error)
        if self._line.fileno() >= 0:
            self._thread.unwatch(self._line)
            self._line.close()

    def _begin(self, rank: int) -> None:
        if self._line.fileno() >= 0:
            self._thread.watch(self._line, READ, lambda _: self._ended(rank))
            self._thread.spare(self._reads.map_ahead())

    def _ended(self, rank: int) -> None:
        error = _lost(self._line, rank)
        if error is not None:
            self.close(error)


def _lost(line: socket.socket, rank: int) -> BatonError | None:
    """The life line has nothing to say while the source lives."""
    try:
        line.recv(1)
    except BlockingIOError:
        return None
    except OSError as error:
        return NodeLost(f"source rank {rank} is gone: {error}", stage="pull")
    return NodeLost(f"source rank {rank} is gone: its shared pool was closed", stage="pull")


def _mapped(line: socket.socket, export: Export, deadline: Deadline) -> View:
    try:
        line.settimeout(max(deadline.left_s(), 0.001))
        line.connect("\0" + export.shm_socket.removeprefix("@"))
        line.send(export.nonce)
        answer, fds, _, _ = socket.recv_fds(line, len(_ACCEPTED), 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"no shared pool at {export.shm_socket}: {error}", stage="pull", cause="shm") from error
    if answer != _ACCEPTED or not fds:
        for fd in fds:
            os.close(fd)
        raise Incompatible(f"{export.shm_socket} refuses: it is another pool's", stage="pull", cause="nonce")
    view = map_readonly(fds[0])
    if not view.alive(export.nonce) or len(view.data) != export.pool_bytes:
        raise Incompatible(f"{export.shm_socket} handed over another pool", stage="pull", cause="nonce")
    return view


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(NONCE_BYTES + 1)
    except OSError:
        return b""


def _peer_uid(sock: socket.socket) -> int:
    _, uid, _ = _PEER_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size))
    return int(uid)
