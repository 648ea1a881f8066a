"""Accepting connections on the transfer thread. Knows not what is spoken on them."""

from __future__ import annotations

import socket
from collections.abc import Callable

from baton.deadline import Deadline
from kv_transfer.thread import READ, TransferThread


class Listener:
    """Calls `accepted(sock)` for every connection to a listening socket; ended by `close`.

    When accepting fails (no descriptors left), it pauses instead of spinning: peers wait in the kernel's backlog.
    """

    def __init__(
        self, thread: TransferThread, sock: socket.socket, accepted: Callable[[socket.socket], None], *, pause_s: float = 0.5
    ) -> None:
        self.sock = sock
        self._thread = thread
        self._pause_s = pause_s
        self._closed = False
        sock.setblocking(False)
        self._listen(accepted)

    def close(self) -> None:
        """Accept no more."""
        self._closed = True
        self._thread.unwatch(self.sock)
        self.sock.close()

    def _listen(self, accepted: Callable[[socket.socket], None]) -> None:
        if not self._closed:
            self._thread.watch(self.sock, READ, lambda _: self._ready(accepted))

    def _ready(self, accepted: Callable[[socket.socket], None]) -> None:
        try:
            sock, _address = self.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the peer went away before we looked
        except OSError:
            self._thread.unwatch(self.sock)
            self._thread.at(Deadline.after(self._pause_s), lambda: self._listen(accepted))
            return
        accepted(sock)
