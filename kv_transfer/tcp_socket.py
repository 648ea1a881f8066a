"""What both ends of the tcp transport do with a socket: options, and scatter-gather over many memory views. Knows no frames."""

from __future__ import annotations

import socket
from collections.abc import Iterable

MAX_IOVECS = 1024  # what one sendmsg or recvmsg takes
WINDOW_BYTES = 2 * 2**20  # offered to one call: a socket buffer holds no more, and building iovecs costs time
TURN_BYTES = 8 * 2**20  # moved on one connection before others have their turn
USER_TIMEOUT_MS = 5000


class Iovec:
    """Many views, filled or emptied from the front. Ends with its last byte; holds the buffers until then."""

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._views = list(views)
        self._at = 0
        self.left_bytes = sum(len(view) for view in self._views)

    def window(self) -> list[memoryview]:
        """The next views, for one system call."""
        until, nbytes = self._at, 0
        limit = min(len(self._views), self._at + MAX_IOVECS)
        while until < limit and nbytes < WINDOW_BYTES:
            nbytes += len(self._views[until])
            until += 1
        return self._views[self._at : until]

    def advance(self, nbytes: int) -> None:
        """The first `nbytes` bytes are done; a view may be done in part."""
        assert 0 <= nbytes <= self.left_bytes
        self.left_bytes -= nbytes
        while nbytes:
            view = self._views[self._at]
            if nbytes < len(view):
                self._views[self._at] = view[nbytes:]
                return
            nbytes -= len(view)
            self._at += 1


def receive(sock: socket.socket, into: Iovec) -> bool:
    """Fill from a non-blocking socket as far as bytes have come (at most a turn's); False if the peer has closed."""
    budget = TURN_BYTES
    while into.left_bytes and budget > 0:
        try:
            nbytes = sock.recvmsg_into(into.window())[0]
        except BlockingIOError:
            return True
        if nbytes == 0:
            return False
        into.advance(nbytes)
        budget -= nbytes
    return True


def send(sock: socket.socket, out_of: Iovec) -> int:
    """Send as much as a non-blocking socket takes (at most a turn's); the bytes it took."""
    before = out_of.left_bytes
    while out_of.left_bytes and before - out_of.left_bytes < TURN_BYTES:
        try:
            out_of.advance(sock.sendmsg(out_of.window()))
        except BlockingIOError:
            break
    return before - out_of.left_bytes


def tune(sock: socket.socket) -> None:
    """Non-blocking, and a peer that vanished is noticed within about five seconds; one that is stopped never: readers have deadlines."""
    sock.setblocking(False)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
    ):
        sock.setsockopt(level, option, value)
