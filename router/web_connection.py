"""One HTTP connection as uvicorn serves it, with what uvicorn leaves to a proxy in front: patience that ends, and room that is made.

Knows uvicorn's protocol for h11, bytes and timers; knows no routes. An *idle* connection is one without an exchange under way: it has
said nothing yet, or is between two requests. It costs a descriptor, so the idlest make room when there are too many; those with an
exchange never do.

A stream's events take a short way: whoever answers finds the connection in its ASGI scope and writes to it without a coroutine per
event. The head and the end of such a response go through ASGI like any other.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Scope
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from baton.errors import InvalidRequest
from baton.telemetry import Refusals
from router.web_answers import error_json, to_json
from router.web_turns import Turns, TurnTransport

_KEY = "baton_connection"
_MALFORMED = to_json(error_json(InvalidRequest("this is not HTTP/1.1 as it should be", cause="malformed_http")))


class Connections:
    """All connections of one server. Owner: its loop. A connection is listed while it is idle; its own end takes it out.

    most: how many may be open. head_s: what a client gets to send the head of a request, from its first byte on, or the rest of a body
    after its answer; idle_s: what a new connection may wait before it.
    """

    def __init__(self, refusals: Refusals, *, most: int, head_s: float, idle_s: float) -> None:
        self.refusals = refusals
        self.log = logging.getLogger("uvicorn.error.connection")
        self.log.setLevel(logging.ERROR)  # a warning for everyone who speaks no HTTP would be theirs to write; see refusals
        self.head_s = head_s
        self.idle_s = idle_s
        self.turns = Turns()
        self._most = most
        self._idle: dict[Connection, None] = {}  # longest idle first

    def joined(self, connection: Connection, num_open: int) -> None:
        """A client has connected: make room if that is one too many."""
        if num_open > self._most:
            self.refusals.add("connections", f"{num_open} are open, at most {self._most} may be")
            idlest = next(iter(self._idle), connection)
            self._idle.pop(idlest, None)  # now: it is closed only once the loop has come round
            idlest.make_room()
        if not connection.leaving:
            self._idle[connection] = None

    def busy(self, connection: Connection) -> None:
        """An exchange has begun."""
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """An exchange has ended."""
        self._idle[connection] = None


class _Wait(enum.Enum):
    """What the client of an idle connection may take its time for."""

    NEXT = "the first byte of a request"
    REST = "the rest of a head, or of a body whose answer has been sent"


class Connection(H11Protocol):
    """Ended by its client, by uvicorn's keep-alive, by a request that is none, by its own timer, or to make room."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state | {_KEY: self}, _loop)
        self.logger = connections.log
        self._on_lost: Callable[[], object] | None = None
        self._all = connections
        self._in_exchange = False
        self._wait: _Wait | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(TurnTransport(transport, self._all.turns))
        self._all.joined(self, len(self.connections))
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over, whoever ended it."""
        super().connection_lost(exc)
        self._await(None)
        self._all.busy(self)  # lists it no more
        if self._on_lost is not None:
            self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer has been sent."""
        super().on_response_complete()
        self._look()

    def watch(self, on_lost: Callable[[], object]) -> None:
        """Have `on_lost` called once it is over, whoever ends it, until `unwatch`."""
        self._on_lost = on_lost
        self.flow.resume_reading()  # of a large body the last part may have stopped it, and then nobody would notice
        if self.leaving:
            on_lost()

    def unwatch(self) -> None:
        """The exchange is over."""
        self._on_lost = None

    async def room(self) -> None:
        """Return once its client has read on, or it is over."""
        await self.flow.drain()

    def write_body(self, data: bytes) -> bool:
        """A part of the body of the response whose head has been sent, which says no length; to be ended through ASGI.

        False: its client has left so much unread that it should get no more for now.
        """
        if self.scope["http_version"] == "1.1":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.transport.write(data)
        return not self.flow.write_paused

    def flush(self) -> None:
        """Let what was written leave now."""
        assert isinstance(self.transport, TurnTransport)
        self.transport.flush()

    def give_up(self) -> None:
        """End it now, and with it the response under way: its client does not read."""
        self._disown()
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP. Said in JSON if nothing else has been said yet; an exchange under way ends as if its client had left."""
        self._all.refusals.add("malformed_http", self.client)
        self._disown()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(_MALFORMED)).encode()),
                (b"connection", b"close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=_MALFORMED), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def make_room(self) -> None:
        """End it now: nothing is under way, but for an answer that its client may have left unread."""
        self.transport.abort()

    @property
    def leaving(self) -> bool:
        """Whether it is closed, or as good as closed."""
        return self.transport.is_closing()

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        return self.cycle  # uvicorn's types do not say that there is none at first

    def _disown(self) -> None:
        """The exchange under way ends as if its client had left."""
        if (cycle := self._cycle) is not None:
            cycle.disconnected = True
            cycle.message_event.set()

    def _should_upgrade(self) -> bool:
        """There is nothing to upgrade to, and uvicorn would log two lines for everyone who asks."""
        return False

    def _look(self) -> None:
        """See whether an exchange has begun or ended, and what an idle client may wait for."""
        if self.leaving:
            self._await(None)
            return
        in_exchange = (cycle := self._cycle) is not None and not cycle.response_complete
        if in_exchange != self._in_exchange:
            self._in_exchange = in_exchange
            (self._all.busy if in_exchange else self._all.idle)(self)
        if in_exchange:
            self._await(None)
        else:
            begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
            self._await(_Wait.REST if begun else _Wait.NEXT)

    def _await(self, wait: _Wait | None) -> None:
        """Bytes that trickle in do not make a wait longer: only another one begins anew."""
        if wait is self._wait:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wait, self._timer = wait, None
        if wait is not None:
            seconds = self._all.head_s if wait is _Wait.REST else self._all.idle_s
            self._timer = self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if self._wait is _Wait.REST:
            self._all.refusals.add("slow_head", self.client)
        self.transport.close()


def connection_of(scope: Scope) -> Connection:
    """The connection that a request has come on."""
    connection = scope["state"][_KEY]
    assert isinstance(connection, Connection)
    return connection
