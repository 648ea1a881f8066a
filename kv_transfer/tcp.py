"""The reading end of the tcp transport: two connections per source rank, spans received straight into the target buffer.

A dead source is an error at once, a vanished one within about five seconds, a stopped one never: each read ends at its own deadline.
To stop a read, its connection is closed: after that nothing of it can be written, since only this thread writes.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any, Self

from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded, NodeLost, Unavailable
from kv_transfer.tcp_frame import REPLY, TRAILER, Request, Status, chunked, split, unpack_reply, unpack_trailer
from kv_transfer.tcp_socket import Iovec, receive, send, tune
from kv_transfer.thread import READ, WRITE, Timer, TransferThread
from kv_transfer.transport import Check, Export, Spans, Ticket

NUM_LANES = 2
MIN_LANE_BYTES = 256 * 2**10  # below, a second connection costs more than it brings

SocketAddress = tuple[Any, ...]  # what the socket module takes: (host, port) and, for IPv6, two numbers more


class TcpDestination:
    """Reads one export over NUM_LANES connections, opened when first needed. Ends by `close`, which closes them."""

    name = "tcp"

    def __init__(self, thread: TransferThread, export: Export, family: int, address: SocketAddress, target: memoryview) -> None:
        self._thread = thread
        self._export = export
        self._target = target
        self._lanes = [_Lane(thread, export, family, address) for _ in range(NUM_LANES)]
        self._turn = 0

    @classmethod
    def connect(cls, thread: TransferThread, export: Export, target: memoryview) -> Self:
        """Take the export's address, which is a number: nobody's name server is asked. Raises Unavailable if there is none."""
        host, _, port = export.tcp_address.rpartition(":")
        try:
            if not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
                raise ValueError("no port")
            found = socket.getaddrinfo(host.strip("[]") or "-", int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            family, _, _, _, address = found[0]
        except (OSError, ValueError) as error:
            raise Unavailable(f"source rank {export.rank} has no tcp address ({export.tcp_address!r}: {error})", stage="pull") from error
        return cls(thread, export, family, address, target)

    def read(self, spans: Spans, check: Check, deadline: Deadline, ticket: Ticket) -> None:
        """See Destination. Each lane carries its share as a part, or several where a frame cannot hold it."""
        for share in split(spans, NUM_LANES, MIN_LANE_BYTES):
            lane = self._lanes[self._turn % NUM_LANES]
            self._turn += 1
            for portion in chunked(share):
                lane.add(_Part(lane, self._export.nonce, portion, check, ticket, self._target), deadline)

    def close(self, error: BatonError) -> None:
        """See Destination."""
        for lane in self._lanes:
            lane.close(error)


class _Part:
    """One request and where its answer goes. Ends once: by its trailer, its deadline, a stop, or its connection."""

    def __init__(self, lane: _Lane, nonce: bytes, spans: Spans, check: Check, ticket: Ticket, target: memoryview) -> None:
        self.frame = Request(nonce, spans.source, spans.nbytes, check).pack()
        self.nbytes = spans.total_bytes
        self._lane = lane
        self._timer: Timer | None = None
        self._reply = bytearray(REPLY.size)
        self._trailer = bytearray(TRAILER.size)
        self._spans = spans
        self._target = target
        self._ticket = ticket
        self._in_body = False
        self.expecting = Iovec([memoryview(self._reply)])
        self.over = False

    def enlist(self, timer: Timer) -> None:
        """Become a part of the ticket: from here on it must end, at the latest when the timer stops it."""
        self._timer = timer
        self._ticket.add_part(self.stop)

    def stop(self, error: BatonError) -> None:
        """End it from outside."""
        self._lane.stop(self, error)

    def advance(self) -> bool:
        """What was expected has arrived: True if that was all. Raises the source's refusal."""
        if not self._in_body:
            _raise_unless_ok(unpack_reply(self._reply, self.nbytes))
            self._in_body = True
            places = zip(self._spans.target.tolist(), self._spans.nbytes.tolist(), strict=True)
            self.expecting = Iovec([*(self._target[at : at + nbytes] for at, nbytes in places), memoryview(self._trailer)])
            return False
        _raise_unless_ok(unpack_trailer(self._trailer))
        return True

    def end(self) -> None:
        """All bytes are there and were right."""
        if self._finish():
            self._ticket.end_part(self.nbytes)

    def fail(self, error: BatonError) -> None:
        """It ends here, and nothing writes for it any more."""
        if self._finish():
            self._ticket.fail_part(error)

    def _finish(self) -> bool:
        first, self.over = not self.over, True
        if self._timer is not None:
            self._timer.cancel()
        self.expecting = Iovec([])
        return first


class _Lane:
    """One connection and the parts that wait for it; carries one at a time. Opened by the first part, closed by an error or `close`."""

    def __init__(self, thread: TransferThread, export: Export, family: int, address: SocketAddress) -> None:
        self._thread = thread
        self._export = export
        self._family = family
        self._address = address
        self._sock: socket.socket | None = None
        self._waiting: deque[_Part] = deque()
        self._active: _Part | None = None
        self._out = Iovec([])
        self._starting = False
        self._closed: BatonError | None = None

    def add(self, part: _Part, deadline: Deadline) -> None:
        """Carry a part when its turn comes, until the deadline."""
        self._waiting.append(part)
        late = DeadlineExceeded("the blocks were not read in time", stage="pull")
        part.enlist(self._thread.at(deadline, lambda: part.stop(late)))
        if self._closed is not None:
            part.fail(self._closed)
        self._next()

    def close(self, error: BatonError) -> None:
        """End everything with `error`, also what comes later."""
        self._closed = error
        self._disconnect()
        waiting, self._waiting = self._waiting, deque()
        active, self._active = self._active, None
        for part in (*([active] if active else []), *waiting):
            part.fail(error)

    def _next(self) -> None:
        """Start waiting parts until one is under way. A part that fails may stop others and lead back here: one loop serves all."""
        if self._starting:
            return
        self._starting = True
        while self._active is None and self._waiting:
            part = self._waiting.popleft()
            if not part.over:
                self._start(part)
        self._starting = False

    def _start(self, part: _Part) -> None:
        self._active = part
        self._out = Iovec([memoryview(part.frame)])
        try:
            if self._sock is None:
                self._sock = socket.socket(self._family, socket.SOCK_STREAM)
                tune(self._sock)
                self._begin_connect(self._sock)
            self._thread.watch(self._sock, READ | WRITE, self._ready)
        except OSError as error:
            self._break(error)

    def _begin_connect(self, sock: socket.socket) -> None:
        try:
            sock.connect(self._address)
        except BlockingIOError:
            return  # its end is seen as readiness to write

    def _ready(self, events: int) -> None:
        assert self._sock is not None
        try:
            if events & WRITE:
                self._write(self._sock)
            if events & READ:
                self._read(self._sock)
        except OSError as error:
            self._break(error)
        except BatonError as error:
            self._refused(error)

    def _write(self, sock: socket.socket) -> None:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "cannot connect")
        send(sock, self._out)
        if not self._out.left_bytes:
            self._thread.watch(sock, READ, self._ready)

    def _read(self, sock: socket.socket) -> None:
        part = self._active
        if part is None:  # idle: the source has closed, or speaks unasked
            self._disconnect()
            return
        if not receive(sock, part.expecting):
            raise ConnectionResetError("it closed the connection")
        if not part.expecting.left_bytes and part.advance():
            self._active = None
            part.end()
            self._next()

    def _refused(self, error: BatonError) -> None:
        """The source said no, or spoke nonsense: what is left on this connection is not worth finding out."""
        part, self._active = self._active, None
        self._disconnect()
        if part is not None:
            part.fail(error)
        self._next()

    def _break(self, error: OSError) -> None:
        self._refused(NodeLost(f"source rank {self._export.rank} at {self._export.tcp_address} is gone: {error}", stage="pull"))

    def stop(self, part: _Part, error: BatonError) -> None:
        """End a part; if it is under way, with its connection."""
        if part is self._active:
            self._active = None
            self._disconnect()
        part.fail(error)
        self._next()

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._thread.unwatch(self._sock)
            self._sock.close()
            self._sock = None
        self._out = Iovec([])


def _raise_unless_ok(status: Status) -> None:
    if status is not Status.OK:
        raise status.error()
