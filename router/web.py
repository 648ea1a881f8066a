"""The HTTP front: OpenAI's and SGLang's interfaces, health and metrics, over whatever generates.

Knows HTTP, keys and limits of a body. Knows no nodes: the router behind it is the `Generates` protocol.
Every route answers errors in OpenAI's JSON form, with the status of the error (baton/errors.py).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from baton.errors import BatonError, InternalError, InvalidRequest, NotFound, TooLarge, Unauthenticated
from baton.request import GenerateRequest, Prompt
from baton.telemetry import CONTENT_TYPE, Refusals
from baton.tokenizer import Tokenizer
from router.flush import Flushed
from router.schema import ChatBody, CompletionBody, Limits, ModelCard, T, parse
from router.schema_native import NativeBody
from router.sink import Sink
from router.web_answers import AnswerFormat, Frame, Json, error_json, error_response, to_json, whole_json
from router.web_middleware import Exchanges, exchange_of
from router.web_native import NativeAnswer
from router.web_openai import ChatAnswer, CompletionAnswer, needs_prompt_ids
from router.web_server import WebServer, serve
from router.web_stream import EventStream, gathered, unless_disconnected

__all__ = ["Generates", "HttpFront", "WebServer", "create_app", "serve"]

log = logging.getLogger(__name__)

MAX_EXCHANGES = 8192
_DROPPED_BODIES = 4
_PARSED_AT_ONCE = 32 * 2**10  # bytes
# What an operator and a load balancer look at: open to all, and answered when everything else is full.
_ALWAYS = ("/health", "/metrics")


Endpoint = Callable[[Request], Awaitable[Response]]


class Generates(Protocol):
    """What the front needs of a router. An error of baton/errors.py may come before the first chunk or in place of any."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    def check(self, request: GenerateRequest) -> None:
        """Refuse at once, before anything is tokenised, what `generate` would refuse. Raises InvalidRequest or NotFound."""

    async def answer(self, request: GenerateRequest, sink: Sink) -> None:
        """Answer into the sink: each choice's last chunk has finish_reason, the last of all has usage. Cancelling cancels the request."""

    async def flush_cache(self, node: str = "") -> Flushed:
        """Forget cached prefixes that no sequence uses, on a node or ("") on all. Raises NotFound, NodeLost, DeadlineExceeded."""

    def ready(self) -> bool:
        """Whether at least one pair of nodes is proven."""

    def status(self) -> dict[str, object]:
        """Nodes and pairs, as JSON can carry them."""

    def metrics(self) -> bytes:
        """Prometheus' text format."""

    def model_card(self) -> ModelCard:
        """What is served."""


class HttpFront:
    """The routes. Holds no state but its settings: what a request needs lives in the task that answers it."""

    def __init__(
        self,
        router: Generates,
        model_name: str,
        api_keys: Sequence[str],
        max_body_bytes: int,
        slow_client_s: float,
        refusals: Refusals,
    ) -> None:
        self._router = router
        self._model_name = model_name
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._slow_client_s = slow_client_s
        self._refusals = refusals

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint, for those who have one of the keys, if there are any."""

        async def checked(request: Request) -> Response:
            self._authenticate(request)
            return await endpoint(request)

        return checked

    def _authenticate(self, request: Request) -> None:
        """Compares all keys, each in constant time."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._api_keys]
        if self._api_keys and not (scheme.lower() == "bearer" and any(matches)):
            raise Unauthenticated("a key is needed: send the header `Authorization: Bearer KEY` with one of this server's keys")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._parsed(CompletionBody, request)
        requests = body.requests(*self._identity(request), Limits())
        frame = await self._frame(f"cmpl-{exchange_of(request.scope).request_id}", body.model, requests, needs_prompt_ids(body))
        return await self._respond(request, requests, CompletionAnswer(frame, body), body.stream)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._parsed(ChatBody, request)
        requests = body.requests(*self._identity(request), Limits())
        frame = await self._frame(f"chatcmpl-{exchange_of(request.scope).request_id}", body.model, requests, needs_prompt_ids(body))
        return await self._respond(request, requests, ChatAnswer(frame, body), body.stream)

    async def native(self, request: Request) -> Response:
        """POST /generate."""
        body = await self._parsed(NativeBody, request)
        requests = body.requests(*self._identity(request), Limits())
        frame = await self._frame(body.rid or exchange_of(request.scope).request_id, "", requests, body.stream)
        return await self._respond(request, requests, NativeAnswer(frame, body), body.stream)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        self._check_model(request.path_params["name"])
        return json_response(self._card())

    async def flush_cache(self, request: Request) -> Response:
        """POST /flush_cache, with ?node= for one node alone."""
        unknown = sorted(set(request.query_params) - {"node"})
        if unknown:
            raise InvalidRequest(f"unknown query parameter {', '.join(unknown)}; known is node")
        flushed = await self._router.flush_cache(request.query_params.get("node", ""))
        return json_response({"groups": flushed.groups, "blocks": flushed.blocks})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 once a request can be served. With ?verbose also nodes and pairs."""
        ready = self._router.ready()
        status = self._router.status()
        content: Json = {} if ready else {"status": "not ready", "reason": status["summary"]}
        if "verbose" in request.query_params:
            content = {"status": "ready"} | content | status
        return json_response(content, 200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._router.metrics(), headers={"Content-Type": CONTENT_TYPE})

    async def _respond(self, request: Request, requests: Sequence[GenerateRequest], answer: AnswerFormat, stream: bool) -> Response:
        if stream:
            return EventStream(self._router.answer, requests, answer, self._slow_client_s)
        await unless_disconnected(request.receive, gathered(self._router.answer, requests, answer))
        return Response(await asyncio.to_thread(whole_json, answer), media_type="application/json")

    async def _parsed(self, kind: type[T], request: Request) -> T:
        """The body as what it should be. A large one may take seconds, in which the loop, and what beats on it, must not stand still."""
        body = await self._body(request)
        return parse(kind, body) if len(body) <= _PARSED_AT_ONCE else await asyncio.to_thread(parse, kind, body)

    async def _body(self, request: Request) -> bytes:
        """The whole body, if it is within the limit. A declared length is refused unread.

        Of a body over the limit a few times as much is read and dropped: a client that is still sending when the connection closes
        would lose the answer with it.
        """
        exchange, most = exchange_of(request.scope), _DROPPED_BODIES * self._max_body_bytes
        declared = request.headers.get("content-length", "0")
        length = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        if length > self._max_body_bytes:
            exchange.closes = length > most  # else the server drops the rest after the answer
            raise self._too_large(length)
        try:
            async with asyncio.timeout(self._slow_client_s):
                body, length = await _read(request, self._max_body_bytes, most)
        except TimeoutError as error:
            exchange.closes = True
            raise InvalidRequest(f"the body did not arrive within {self._slow_client_s:g} s") from error
        if length > self._max_body_bytes:
            exchange.closes = length > most
            raise self._too_large(length)
        return body

    def _too_large(self, length: int) -> TooLarge:
        return TooLarge(f"the body may have at most {self._max_body_bytes} bytes (given: {length} or more)")

    def _identity(self, request: Request) -> tuple[str, float | None]:
        """The request's id and the client's deadline in seconds."""
        if "x-request-id" in request.headers and request.headers["x-request-id"] != exchange_of(request.scope).request_id:
            raise InvalidRequest("X-Request-Id must be 1 to 128 visible ASCII characters")
        return exchange_of(request.scope).request_id, _timeout_s(request.headers.get("x-request-timeout-s"))

    async def _frame(self, answer_id: str, model: str, requests: Sequence[GenerateRequest], with_ids: bool) -> Frame:
        for asked in requests:
            self._router.check(asked)
        self._check_model(model or self._model_name)
        ids = [await asyncio.to_thread(_prompt_ids, self._router.tokenizer, r.prompt) for r in requests] if with_ids else []
        return Frame(answer_id, int(time.time()), self._model_name, self._router.tokenizer, ids)

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise NotFound(f"the model {name!r} is not served here; {self._model_name!r} is", cause="model_not_found", param="model")

    async def on_error(self, _: Request, error: Exception) -> Response:
        """An error of ours in the place of an answer; what is the client's is counted."""
        assert isinstance(error, BatonError)
        if 400 <= error.http_status < 499:
            self._refusals.add(error.cause, error.message)
        return error_response(error)

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        """A path or method that there is not."""
        assert isinstance(error, HTTPException)
        known = NotFound if error.status_code == 404 else InvalidRequest
        told = known(f"{request.method} {request.scope['path'][:200]}: {error.detail}")
        self._refusals.add(told.cause, told.message)
        return Response(to_json(error_json(told)), error.status_code, headers=error.headers, media_type="application/json")

    def _card(self) -> Json:
        card = self._router.model_card()
        return {"id": card.name, "object": "model", "created": card.created, "owned_by": "baton", "max_model_len": card.max_model_len}


def create_app(
    router: Generates,
    *,
    model_name: str,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = 8 * 2**20,
    slow_client_s: float = 60.0,
    max_exchanges: int = MAX_EXCHANGES,
    refusals: Refusals | None = None,
) -> Starlette:
    """The ASGI application. With api_keys, every route but /health and /metrics asks for one.

    slow_client_s: how long a client may take to send its body, or leave its stream unread, before it is given up.
    max_exchanges: at a time, /health and /metrics apart. refusals: counts what is refused.
    """
    refusals = refusals or Refusals("http", log)
    front = HttpFront(router, model_name, api_keys, max_body_bytes, slow_client_s, refusals)
    guarded = front.guarded
    return Starlette(
        routes=[
            Route("/v1/completions", guarded(front.completions), methods=["POST"]),
            Route("/v1/chat/completions", guarded(front.chat), methods=["POST"]),
            Route("/generate", guarded(front.native), methods=["POST"]),
            Route("/flush_cache", guarded(front.flush_cache), methods=["POST"]),
            Route("/v1/models", guarded(front.models), methods=["GET"]),
            Route("/v1/models/{name:path}", guarded(front.model), methods=["GET"]),
            Route("/health", front.health, methods=["GET"]),
            Route("/metrics", front.metrics, methods=["GET"]),
        ],
        exception_handlers={
            BatonError: front.on_error,
            HTTPException: front.on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
        middleware=[Middleware(Exchanges, refusals=refusals, most=max_exchanges, always=frozenset(_ALWAYS))],
    )


def json_response(content: Json, status: int = 200) -> Response:
    """JSON as this front writes it."""
    return Response(to_json(content), status, media_type="application/json")


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it ends the exchange in the server's books


async def _on_bug(_: Request, __: Exception) -> Response:
    return json_response(error_json(InternalError("a bug in the router; its log has the details")), 500)  # the server logs it


async def _read(request: Request, kept: int, most: int) -> tuple[bytes, int]:
    """The body's first `kept` bytes at most, and how many came before its end, or before they were over `most`."""
    body, length = bytearray(), 0
    async for part in request.stream():
        length += len(part)
        if length <= kept:
            body += part
        elif length > most:
            break
    return bytes(body), length


def _timeout_s(header: str | None) -> float | None:
    if header is None:
        return None
    if not re.fullmatch(r"\d{1,9}(\.\d*)?|\.\d+", header.strip()) or float(header) <= 0:
        raise InvalidRequest(f"X-Request-Timeout-S must be a number of seconds over 0 (given: {header!r})")
    return float(header)


def _prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    if prompt.token_ids is not None:
        return prompt.token_ids
    if prompt.messages is not None:
        return tokenizer.render_chat(prompt.messages, prompt.add_generation_prompt, prompt.template_values)
    return tokenizer.encode(prompt.text or "")
