"""OpenAI's /v1/completions and /v1/chat/completions: requests as bytes, and connections for them. Knows JSON and addresses."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from baton.errors import ConfigError, Unavailable
from bench.serve.answers import Answer, Done
from bench.serve.asks import Ask
from bench.serve.backend import Target
from bench.serve.connection import Connection, Connections

_CONNECT_S = 30.0
_MODELS_S = 30.0


class OpenAIBackend:
    """One server. path: one that ends in chat/completions takes messages, any other one a prompt. Raises ConfigError for the address."""

    def __init__(self, target: Target, path: str) -> None:
        self._target = target
        self._chat = path.endswith("chat/completions")
        self._host, self._port, self._ssl = _address(target.url)
        self._connections = Connections()
        self._opening: set[asyncio.Task[None]] = set()
        headers = {"Host": urlsplit(target.url).netloc, "Content-Type": "application/json", **_authorization(target), **target.headers}
        self._head = "\r\n".join(
            [f"POST {urlsplit(target.url).path.rstrip('/')}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), ""]
        )

    def prepare(self, ask: Ask, request_id: str) -> bytes:
        """The whole request. Raises ConfigError for token ids in a chat."""
        body = json.dumps(self._body(ask) | dict(self._target.sampling)).encode()
        return f"{self._head}X-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def _body(self, ask: Ask) -> dict[str, Any]:
        shared: dict[str, Any] = {"model": self._target.model, "stream": True, "stream_options": {"include_usage": True}}
        if self._target.ignore_eos:
            shared["ignore_eos"] = True
        if not self._chat:
            return shared | {"prompt": ask.prompt, "max_tokens": ask.output_len}
        if not isinstance(ask.prompt, str):
            raise ConfigError("a chat takes text, and this data set is made of token ids: use --backend openai")
        return shared | {"messages": [{"role": "user", "content": ask.prompt}], "max_completion_tokens": ask.output_len}

    def send(self, prepared: bytes, answer: Answer, done: Done) -> None:
        """On an idle connection, or a new one."""
        connection = self._connections.idle(time.monotonic())
        if connection is not None:
            connection.carry(prepared, answer, done, self._target)
            return
        task = asyncio.create_task(self._send_on_new(prepared, answer, done))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _send_on_new(self, prepared: bytes, answer: Answer, done: Done) -> None:
        make = partial(Connection, self._connections)
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await asyncio.get_running_loop().create_connection(make, self._host, self._port, ssl=self._ssl)
        except OSError as error:  # a TimeoutError is one, too, and says nothing
            answer.end(time.monotonic(), f"cannot connect to {self._target.url}: {str(error) or 'no answer in time'}")
            done(answer)
            return
        connection.carry(prepared, answer, done, self._target)

    async def models(self) -> list[str]:
        """GET /v1/models."""
        return await asyncio.to_thread(self._models)

    def _models(self) -> list[str]:
        url = f"{self._target.url.rstrip('/')}/v1/models"
        try:
            asked = urllib.request.Request(url, headers={**_authorization(self._target), **self._target.headers})
            with urllib.request.urlopen(asked, timeout=_MODELS_S, context=self._ssl) as reply:
                return [str(card["id"]) for card in json.load(reply)["data"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Unavailable(f"{url} does not say which models are served: {error}", stage="client") from error

    async def close(self) -> None:
        """End everything."""
        for task in tuple(self._opening):
            task.cancel()
        self._connections.close_all()
        await asyncio.sleep(0)  # connections are told of their end in the loop's next turn


def _authorization(target: Target) -> dict[str, str]:
    return {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}


def _address(url: str) -> tuple[str, int, ssl.SSLContext | None]:
    """Host, port and TLS."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url} is no address of a server: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url} is no address of a server: write http://host:port")
    secure = parts.scheme == "https"
    return parts.hostname, port or (443 if secure else 80), ssl.create_default_context() if secure else None
