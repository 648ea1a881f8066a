"""One HTTP connection that carries one request at a time: an asyncio protocol, without stream objects or a task per request.

Measured with 128 streams of one event per 40 ms, CPU microseconds per token: the whole generator over this 15, the loop of vLLM's
generator alone (aiohttp, JSON parsed for every event) 56, aiohttp with nothing parsed 53, httpx 159. Where the generator shares two
cores with the server, 2,000 tokens a second make that 8 % of a core. So no library, and 150 lines.
"""

from __future__ import annotations

import asyncio
import time
from typing import cast

from bench.serve.answers import Answer, Done
from bench.serve.backend import Target
from bench.serve.http_reader import ResponseReader
from bench.serve.sse import Events

# Servers close idle connections (vLLM after 5 s); one that is about to be closed must not carry a request.
_REUSED_WITHIN_S = 1.0
_MAX_ERROR_BYTES = 2000


class Connections:
    """All connections to one server. Owner: the backend, which ends them with `close_all`; each puts itself in and takes itself out."""

    def __init__(self) -> None:
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []

    def idle(self, now_s: float) -> Connection | None:
        """One that may carry a request now; those that were idle for too long are closed on the way."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable(now_s):
                return connection
            connection.close()
        return None

    def opened(self, connection: Connection) -> None:
        """It is there."""
        self._open.add(connection)

    def rests(self, connection: Connection) -> None:
        """It may carry another request."""
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        """It is gone."""
        self._open.discard(connection)

    def close_all(self) -> None:
        """End them, and with them what they carry."""
        for connection in tuple(self._open):
            connection.close()


class Connection(asyncio.Protocol):
    """One connection and the exchange on it, if there is one. Its end ends the exchange."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle_since_s = 0.0
        self._expired = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio tells it."""
        self._transport = cast(asyncio.Transport, transport)
        self._connections.opened(self)

    def usable(self, now_s: float) -> bool:
        """Whether it is open, and the server is unlikely to be closing it."""
        assert self._transport is not None
        return not self._transport.is_closing() and now_s - self._idle_since_s < _REUSED_WITHIN_S

    def carry(self, request: bytes, answer: Answer, done: Done, target: Target) -> None:
        """Send a request whose answer is streamed into `answer`; `done` hears of its end, by a fault after target.timeout_s."""
        assert self._transport is not None and self._exchange is None
        self._exchange = _Exchange(answer, done, with_text=target.with_text)
        self._timer = asyncio.get_running_loop().call_later(target.timeout_s, self._expire)
        self._transport.write(request)
        answer.sent_s = time.monotonic()

    def _expire(self) -> None:
        self._expired = True
        self.close()

    def data_received(self, data: bytes) -> None:
        """As asyncio tells it: once per token, so nothing more happens here than must."""
        now_s = time.monotonic()
        if self._exchange is None:
            self.close()  # nobody has asked
            return
        try:
            self._exchange.take(data, now_s)
        except ValueError as error:
            self._end(now_s, str(error))
            return
        if self._exchange.reader.done:
            self._end(now_s, "")

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio tells it."""
        self._connections.lost(self)
        if self._exchange is not None:
            broken = (
                "no end of the answer in time" if self._expired else f"the connection broke before the answer was whole: {exc or 'EOF'}"
            )
            self._end(time.monotonic(), "" if self._exchange.reader.end() else broken)

    def _end(self, now_s: float, error: str) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None and self._timer is not None
        self._timer.cancel()
        if exchange.reader.reusable and not error:
            self._idle_since_s = now_s
            self._connections.rests(self)
        else:
            self.close()
        exchange.finish(now_s, error)

    def close(self) -> None:
        """At once. Safe to call twice."""
        assert self._transport is not None
        self._transport.abort()


class _Exchange:
    """One response on its way into an answer."""

    def __init__(self, answer: Answer, done: Done, *, with_text: bool) -> None:
        self.reader = ResponseReader(self._body)
        self._answer = answer
        self._done = done
        self._events = Events(answer, with_text=with_text)
        self._refusal = b""
        self._now_s = 0.0

    def take(self, data: bytes, now_s: float) -> None:
        """Bytes of the response. Raises ValueError for what is none."""
        self._now_s = now_s
        self.reader.feed(data)

    def _body(self, data: bytes) -> None:
        if self.reader.status == 200:
            self._events.feed(data, self._now_s)
        elif len(self._refusal) < _MAX_ERROR_BYTES:
            self._refusal += data

    def finish(self, now_s: float, error: str) -> None:
        """It is over. error: "" if the response is whole."""
        if not error and self.reader.status != 200:
            error = f"HTTP {self.reader.status}: {self._refusal[:_MAX_ERROR_BYTES].decode(errors='replace')}"
        self._answer.end(now_s, error)
        self._done(self._answer)
