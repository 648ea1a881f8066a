"""X-Request-Id in and out: every exchange has an id, the client's if it sent a sound one. Pure ASGI, so streams are not buffered."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SOUND = re.compile(r"[\x21-\x7e]{1,128}")
_KEY = "baton_request_id"


class RequestIds:
    """Puts an id into every HTTP scope and into the head of every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with an id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        scope[_KEY] = given if _SOUND.fullmatch(given) else secrets.token_hex(16)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = scope[_KEY]
            await send(message)

        await self._app(scope, receive, send_with_id)


def known_request_id(scope: Scope) -> str:
    """The id RequestIds gave to this exchange."""
    return str(scope[_KEY])
