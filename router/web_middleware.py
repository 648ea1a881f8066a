"""What every exchange has: a request id, the client's if it sent a sound one, and a word on whether the connection goes on.

Pure ASGI, so streams are not buffered. Knows headers; knows no routes.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SOUND = re.compile(r"[\x21-\x7e]{1,128}")
_KEY = "baton_exchange"


@dataclass(slots=True)
class Exchange:
    """One request and its response. Lives as long as its ASGI scope. closes: set where the rest of the body is not worth reading."""

    request_id: str
    closes: bool = False


class Exchanges:
    """Puts an Exchange into every HTTP scope, and what it says into the head of the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with an Exchange."""
        assert scope["type"] == "http", "lifespan and websockets are switched off"
        given = Headers(scope=scope).get("x-request-id", "")
        exchange = scope[_KEY] = Exchange(given if _SOUND.fullmatch(given) else secrets.token_hex(16))

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.request_id
                if exchange.closes:
                    headers["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_more)


def exchange_of(scope: Scope) -> Exchange:
    """The one that Exchanges put there."""
    exchange = scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange
