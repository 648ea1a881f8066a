"""The serving end of the tcp transport: sends spans of a pool to readers that know its nonce. Knows no layouts and no leases."""

from __future__ import annotations

import hmac
import logging
import socket
from dataclasses import dataclass

from baton.deadline import Deadline
from baton.errors import Incompatible
from baton.telemetry import Refusals
from kv_transfer.listener import Listener
from kv_transfer.pool import Pool
from kv_transfer.tcp_frame import REQUEST, Request, RequestHeader, Status, pack_reply, pack_trailer
from kv_transfer.tcp_socket import Iovec, receive, send, tune
from kv_transfer.thread import READ, WRITE, Timer, TransferThread

log = logging.getLogger(__name__)


@dataclass(slots=True)
class TcpCounts:
    """What has happened on one source, for metrics. What it refused is in its book of refusals."""

    connections: int = 0
    reads: int = 0
    bytes_sent: int = 0
    stale_reads: int = 0


class TcpSource:
    """Listens for readers of one pool. Lives on the transfer thread; `close` ends the listener and every connection.

    A connection is made by a reader's connect and ends when the reader closes it, sends a frame that makes no sense or does not end
    within frame_s (the first one, which proves that it is a reader, from the connect), takes not one byte of an answer for stall_s or
    not all of it for answer_s, or with us. At most max_connections; more are closed at once.
    """

    def __init__(
        self,
        thread: TransferThread,
        pool: Pool,
        host: str = "127.0.0.1",
        *,
        max_connections: int = 1024,
        frame_s: float = 5.0,
        stall_s: float = 30.0,
        answer_s: float = 300.0,
    ) -> None:
        self.counts = TcpCounts()
        self.refusals = Refusals("kv tcp", log)
        self.frame_s = frame_s
        self.stall_s = stall_s
        self.answer_s = answer_s
        self._max_connections = max_connections
        self.thread = thread
        self.view = pool.view
        self.nonce = pool.nonce
        self._connections: set[_Connection] = set()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = Listener(thread, socket.create_server((host, 0), family=family, backlog=128), self._accept)

    @property
    def address(self) -> str:
        """host:port (an IPv6 host in brackets)."""
        host, port = self._listener.sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Close the listener and all connections: readers fail from now on."""
        self._listener.close()
        for connection in tuple(self._connections):
            connection.close()

    def ended(self, connection: _Connection) -> None:
        """A connection has closed."""
        self._connections.discard(connection)

    def status_of(self, request: Request) -> Status:
        """Whether the bytes asked for are what the reader expects, now."""
        if not request.fits(len(self.view.data)):
            return Status.BAD_SPAN
        right = self.view.alive(self.nonce) and request.check.stale_block(self.view.generations) is None
        return Status.OK if right else Status.STALE

    def _accept(self, sock: socket.socket) -> None:
        if len(self._connections) >= self._max_connections:
            self.refusals.add("connections", f"{len(self._connections)} are open, at most {self._max_connections} may be")
            sock.close()
        else:
            self.counts.connections += 1
            self._connections.add(_Connection(self, sock))


class _Connection:
    """One reader's connection: takes a request, answers it, and again."""

    def __init__(self, source: TcpSource, sock: socket.socket) -> None:
        self._source = source
        self._sock = sock
        self._timer: Timer | None = source.thread.at(Deadline.after(source.frame_s), self._late)
        self._answered_by: Deadline | None = None
        self._header: RequestHeader | None = None
        self._request: Request | None = None
        self._moved = True
        self._trailer_added = False
        tune(sock)
        self._expect(REQUEST.size)
        source.thread.watch(sock, READ, self._ready)

    def close(self) -> None:
        """End it, in whatever state."""
        self._quiet()
        self._source.thread.unwatch(self._sock)
        self._sock.close()
        self._source.ended(self)

    def _expect(self, nbytes: int) -> None:
        self._buffer = bytearray(nbytes)
        self._iovec = Iovec([memoryview(self._buffer)])

    def _ready(self, _: int) -> None:
        """Take one step; a peer that is gone or makes no sense ends the connection, nothing else."""
        try:
            self._receive() if self._request is None else self._send()
        except Incompatible as error:
            self._refuse(error.cause, error.message)
        except OSError:
            self.close()

    def _receive(self) -> None:
        if not receive(self._sock, self._iovec):
            self.close()
        elif self._iovec.left_bytes:
            self._begin_frame()
        elif self._header is None:
            self._header = RequestHeader.unpack(self._buffer)
            if not hmac.compare_digest(self._header.nonce, self._source.nonce):
                raise Incompatible("a reader of another pool", stage="pull", cause="nonce")
            self._expect(self._header.body_bytes)
            self._receive()
        else:
            self._answer(self._header.request(self._buffer))

    def _begin_frame(self) -> None:
        if self._timer is None and (self._header is not None or self._iovec.left_bytes < REQUEST.size):
            self._timer = self._source.thread.at(Deadline.after(self._source.frame_s), self._late)

    def _answer(self, request: Request) -> None:
        self._quiet()
        self._request = request
        status = self._source.status_of(request)
        self._source.counts.reads += 1
        self._source.counts.stale_reads += status is Status.STALE
        views = [memoryview(pack_reply(status, request.total_bytes))]
        if status is Status.OK:
            data = self._source.view.data
            views += [data[at : at + nbytes] for at, nbytes in zip(request.offsets.tolist(), request.nbytes.tolist(), strict=True)]
        self._trailer_added = status is not Status.OK
        self._iovec = Iovec(views)
        self._answered_by = Deadline.after(self._source.answer_s)
        self._await_progress()
        self._source.thread.watch(self._sock, WRITE, self._ready)
        self._send()

    def _send(self) -> None:
        sent = send(self._sock, self._iovec)
        self._moved = self._moved or sent > 0
        self._source.counts.bytes_sent += sent
        if self._iovec.left_bytes:
            return
        if self._trailer_added:
            self._await_request()
        else:
            self._add_trailer()
            self._send()

    def _add_trailer(self) -> None:
        """All bytes have been copied out of the pool: were they right to the end?"""
        assert self._request is not None
        status = self._source.status_of(self._request)
        self._source.counts.stale_reads += status is Status.STALE
        self._iovec = Iovec([memoryview(pack_trailer(status))])
        self._trailer_added = True

    def _await_request(self) -> None:
        self._quiet()
        self._header = self._request = self._answered_by = None
        self._expect(REQUEST.size)
        self._source.thread.watch(self._sock, READ, self._ready)

    def _await_progress(self) -> None:
        assert self._answered_by is not None
        self._moved = False
        look_again = self._answered_by.sooner(self._source.stall_s)
        self._timer = self._source.thread.at(look_again, self._judge_progress)

    def _judge_progress(self) -> None:
        assert self._answered_by is not None
        if not self._moved:
            self._refuse("stalled", f"not a byte was taken for {self._source.stall_s:g} s")
        elif self._answered_by.passed():
            self._refuse("slow", f"an answer was not taken within {self._source.answer_s:g} s")
        else:
            self._await_progress()

    def _late(self) -> None:
        self._refuse("late", f"a request did not come to its end within {self._source.frame_s:g} s")

    def _refuse(self, reason: str, detail: str) -> None:
        self._source.refusals.add(reason, detail)
        self.close()

    def _quiet(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
