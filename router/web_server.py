"""Running the HTTP front on a socket, inside an event loop that belongs to someone else. Knows uvicorn and sockets, no routes."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from baton.errors import ConfigError
from baton.rpc import descriptors
from baton.telemetry import Refusals
from router.web_connection import Connection, Connections

log = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 75
HEAD_S = 20.0
MAX_HEAD_BYTES = 32 * 2**10
MAX_CONNECTIONS = 16_384
GRACE_S = 5
# On Linux a peer that acknowledges nothing, or keeps its window shut, for this long is gone; sooner than a client's own patience.
USER_TIMEOUT_MS = 120_000


class WebServer(uvicorn.Server):
    """uvicorn without signal handling. Owner: whoever called `serve`; it must call `stop`, which ends all connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._started = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._started.set()

    async def run_on(self, listener: socket.socket) -> None:
        """Serve on a bound socket; returns once requests are accepted, raises what keeps them from being."""
        self._running = asyncio.create_task(self.serve([listener]))
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait({self._running, started}, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._running.done():
            self._running.result()
            raise ConfigError("the HTTP server ended as soon as it had started")

    async def stop(self) -> None:
        """Accept nothing more, give running exchanges their grace, then cancel them."""
        self.should_exit = True
        if self._running is not None:
            await self._running


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    grace_s: int = GRACE_S,
    *,
    refusals: Refusals | None = None,
    max_connections: int = MAX_CONNECTIONS,
    head_s: float = HEAD_S,
) -> tuple[WebServer, int]:
    """Serve `app` on host:port (0: any free port) in the running loop; the server and its port. ConfigError if it cannot listen there.

    grace_s: what running exchanges get when the server is stopped, before they are cancelled. refusals: counts connections that came
    to nothing. max_connections: at most, and at most half of the descriptors that this process may have.
    """
    listener = _listen(host, port)
    most = min(max_connections, descriptors() // 2)
    connections = Connections(refusals or Refusals("http", log), most=most, head_s=head_s, idle_s=KEEP_ALIVE_S)
    config = uvicorn.Config(
        app,
        http=cast("Any", partial(Connection, connections)),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,  # nobody here asks where a client is
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = WebServer(config)
    await server.run_on(listener)
    return server, int(listener.getsockname()[1])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Named, for asyncio switches Nagle's algorithm off only for sockets that say they are TCP: else events wait 40 ms for each other.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen for HTTP on {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen for HTTP on {host} port {port}: {error.strerror}") from error
    return listener
