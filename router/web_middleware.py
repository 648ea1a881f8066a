"""What every exchange has: a request id, the client's if it sent a sound one, and a word on whether the connection goes on.

Also the first to refuse: too many exchanges at a time, too many headers, a body that is compressed. Pure ASGI, so streams are not
buffered. Knows headers; knows no routes but those that must answer when the rest is full.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import BatonError, InvalidRequest, ResourceExhausted
from baton.telemetry import Refusals
from router.web_answers import error_response

MAX_HEADERS = 128
_SOUND = re.compile(r"[\x21-\x7e]{1,128}")
_KEY = "baton_exchange"


@dataclass(slots=True)
class Exchange:
    """One request and its response. Lives as long as its ASGI scope. closes: set where the rest of the body is not worth reading."""

    request_id: str
    closes: bool = False


class Exchanges:
    """Puts an Exchange into every HTTP scope, and what it says into the head of the response. State owner: the server's loop.

    most: exchanges at a time; more are answered 429, but for the paths in `always`.
    """

    def __init__(self, app: ASGIApp, refusals: Refusals, most: int, always: frozenset[str]) -> None:
        self._app = app
        self._refusals = refusals
        self._most = most
        self._always = always
        self._num = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with an Exchange; or refuse."""
        assert scope["type"] == "http", "lifespan and websockets are switched off"
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        exchange = scope[_KEY] = Exchange(given if _SOUND.fullmatch(given) else secrets.token_hex(16))

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.request_id
                if exchange.closes:
                    headers["Connection"] = "close"
            await send(message)

        try:
            with self._place(scope["path"]):
                _check_headers(headers)
                await self._app(scope, receive, send_more)
        except BatonError as error:  # of ours: what the routes raise is answered there
            self._refusals.add(error.cause, error.message)
            await error_response(error)(scope, receive, send_more)

    @contextmanager
    def _place(self, path: str) -> Iterator[None]:
        counted = path not in self._always
        if counted and self._num >= self._most:
            raise ResourceExhausted(
                f"{self._num} HTTP requests are under way here, at most {self._most} may be",
                stage="admission",
                cause="exchanges",
                retry_after_s=1.0,
            )
        self._num += counted
        try:
            yield
        finally:
            self._num -= counted


def _check_headers(headers: Headers) -> None:
    if len(headers.raw) > MAX_HEADERS:
        raise InvalidRequest(f"a request may have {MAX_HEADERS} headers, this one has {len(headers.raw)}", cause="headers")
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidRequest(f"Content-Encoding {encoding[:40]!r} is not taken: send the body as it is", cause="content_encoding")


def exchange_of(scope: Scope) -> Exchange:
    """The one that Exchanges put there."""
    exchange = scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange
