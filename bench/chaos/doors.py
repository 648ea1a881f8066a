"""The ways into a cluster: one request over gRPC or HTTP as a stream of pieces. Knows both interfaces; judges nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from baton.client import Client, Options
from baton.errors import BatonError, DeadlineExceeded, InternalError, ResourceExhausted, Unavailable
from baton.request import Chunk
from bench.chaos.asks import Ask, Door
from bench.chaos.said import Piece
from bench.chaos.sse import EventStream

_BY_STATUS: dict[int, type[BatonError]] = {429: ResourceExhausted, 503: Unavailable, 504: DeadlineExceeded}
_BY_CAUSE: dict[str, type[BatonError]] = {"deadline": DeadlineExceeded, "node_lost": Unavailable, "unavailable": Unavailable}


class Doors:
    """The interfaces of one cluster as one client uses them: a gRPC connection of its own, and one HTTP connection per request.

    Owner: the client. `async with` closes the connection.
    """

    def __init__(self, grpc: str, http: str) -> None:
        self._client = Client(grpc)
        self._http = http

    async def __aenter__(self) -> Doors:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()

    def stream(self, ask: Ask, deadline_s: float) -> AsyncGenerator[Piece, None]:
        """The answer as it comes. Raises BatonError; closing the iterator leaves the request."""
        return self._by_grpc(ask, deadline_s) if ask.door is Door.GRPC else http_stream(EventStream(self._http), ask, deadline_s)

    async def _by_grpc(self, ask: Ask, deadline_s: float) -> AsyncGenerator[Piece, None]:
        options: Options = {
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "top_k": ask.top_k,
            "seed": ask.seed,
            "stop": ask.stop,
            "ignore_eos": ask.ignore_eos,
            "timeout_s": deadline_s,
        }
        if ask.num_logprobs is not None:
            options["logprobs"] = ask.num_logprobs
        async with aclosing(self._client.generate(ask.prompt_ids, **options)) as chunks:
            async for chunk in chunks:
                yield _piece_of_chunk(chunk)


async def http_stream(events: EventStream, ask: Ask, deadline_s: float) -> AsyncGenerator[Piece, None]:
    """The same over /v1/completions, on a connection that ends with the iterator."""
    try:
        async with aclosing(events.post("/v1/completions", _body(ask), {"X-Request-Timeout-S": f"{deadline_s:.3f}"})) as answer:
            async for status, content in answer:
                if "error" in content:
                    raise _error(status, content["error"])
                yield _piece_of_event(content)
    finally:
        events.close()


def _body(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": list(ask.prompt_ids),
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k,
        "seed": ask.seed,
        "stop": list(ask.stop),
        "ignore_eos": ask.ignore_eos,
        "logprobs": ask.num_logprobs,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


def _piece_of_chunk(chunk: Chunk) -> Piece:
    usage = chunk.usage
    return Piece(
        token_ids=chunk.token_ids,
        text=chunk.text,
        logprobs=tuple(item.logprob for item in chunk.logprobs),
        finish_reason=chunk.finish_reason or "",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        served_by=chunk.served_by,
    )


def _piece_of_event(content: Mapping[str, Any]) -> Piece:
    choice: dict[str, Any] = next(iter(content["choices"]), {})
    usage = content.get("usage") or {}
    return Piece(
        token_ids=tuple(choice.get("token_ids", ())),
        text=choice.get("text", ""),
        logprobs=tuple((choice.get("logprobs") or {}).get("token_logprobs", ())),
        finish_reason=choice.get("finish_reason") or "",
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
    )


def _error(status: int, content: Mapping[str, Any]) -> BatonError:
    """OpenAI's error object as ours. In the middle of a stream the status is still 200, and the cause says what it is."""
    kind = _BY_STATUS.get(status) or _BY_CAUSE.get(content["code"], InternalError)
    return kind(content["message"], stage=content.get("stage", "router"), node=content.get("node", ""), cause=content["code"])
