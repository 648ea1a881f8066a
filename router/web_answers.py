"""What the three answer formats share: collecting the chunks of a choice, counting usage, errors and events as JSON.

Pure. Knows chunks, JSON and how HTTP carries an error; knows no routes and no particular format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from json.encoder import encode_basestring
from typing import Any, Protocol

from starlette.responses import Response

from baton.errors import BatonError
from baton.request import Chunk, FinishReason, TokenLogprob, Usage
from baton.tokenizer import Tokenizer

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0
_PARTS_DEPTH = 5  # answer, choices, choice, logprobs, their list: what is left for a part is one token's
DONE = b"data: [DONE]\n\n"
_MARK = "\0"


class AnswerFormat(Protocol):
    """One HTTP request's answer in the making. prompt is the number of the prompt a chunk belongs to."""

    def take(self, prompt: int, chunk: Chunk) -> None:
        """Remember a chunk of an answer that is sent as a whole."""

    def whole(self) -> Json | list[Json]:
        """The body, after the last chunk."""

    def events(self, prompt: int, chunk: Chunk) -> bytes:
        """Take a chunk of a stream, and say what to send for it: at least one server-sent event, also if it has no text."""

    def closing(self) -> Iterator[Json]:
        """What to send after the last chunk."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What all parts of one answer repeat. created: Unix seconds. prompt_ids: by prompt; empty unless the client needs them."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    prompt_ids: Sequence[tuple[int, ...]] = ()


@dataclass(slots=True)
class Collected:
    """One choice so far. Owner: the answer it is part of."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        if len(self.texts) > 1:
            self.texts = ["".join(self.texts)]
        return self.texts[0] if self.texts else ""

    def add(self, chunk: Chunk) -> None:
        """Go on with a delta, or start again with a chunk that is the whole answer."""
        if not chunk.is_delta:
            self.texts, self.token_ids, self.logprobs = [], [], []
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        if chunk.finish_reason is not None:
            self.finish_reason, self.stopped_by = chunk.finish_reason, chunk.stopped_by


class Collection:
    """All choices of all prompts of one HTTP request. Owner: the task that answers it.

    num_tokens: by choice. choices: what was added, empty if it was only counted.
    """

    def __init__(self, num_prompts: int, n: int, prompt_ids: Sequence[tuple[int, ...]]) -> None:
        self.choices = [Collected() for _ in range(num_prompts * n)]
        self.num_tokens = [0] * (num_prompts * n)
        self._n = n
        self._usages: dict[int, Usage] = {}
        self._prompt_tokens = sum(len(ids) for ids in prompt_ids)

    def add(self, prompt: int, chunk: Chunk) -> int:
        """Add a chunk; the index of its choice among all."""
        index = self.count(prompt, chunk)
        self.choices[index].add(chunk)
        return index

    def count(self, prompt: int, chunk: Chunk) -> int:
        """Count a chunk that is sent on at once, and not kept; the index of its choice among all."""
        index = prompt * self._n + chunk.choice
        self.num_tokens[index] += len(chunk.token_ids)
        if chunk.usage is not None:
            self._usages[prompt] = chunk.usage
        return index

    def usage(self) -> Usage:
        """Over all prompts, after the last chunk."""
        return reduce(Usage.plus, self._usages.values(), Usage())

    def usage_so_far(self) -> Usage:
        """Counted from the tokens that came; prompt tokens only if the prompts' ids are known."""
        return Usage(self._prompt_tokens, sum(self.num_tokens))


class TextEvents:
    """Server-sent events that are alike but for one text: what is alike is made once.

    event_of: the event's content for a text; what follows the text in it must not depend on anything.
    """

    def __init__(self, event_of: Callable[[str], Json]) -> None:
        self._before, mark, self._after = event(event_of(_MARK)).rpartition(_encoded(_MARK))
        assert mark, "the text is in the event as it is"

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + _encoded(text) + self._after


def usage_json(usage: Usage) -> Json:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _encoded(text: str) -> bytes:
    return encode_basestring(text).encode("utf-8")


def finite(logprob: float) -> float:
    """A logprob that JSON can carry."""
    return max(logprob, LEAST_LOGPROB)


def event(content: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


def to_json(content: Json | list[Json]) -> bytes:
    """Compact UTF-8 JSON; NaN and infinity would be a bug."""
    return _dumped(content)


def whole_json(answer: AnswerFormat) -> bytes:
    """The body of an answer that is sent as a whole. With logprobs that may be seconds of work: run it in a thread.

    One call of json.dumps would keep the interpreter for all of it, and with it the loop: a router that is silent for so long counts as
    gone. So it is called for small parts.
    """
    return b"".join(parts(answer.whole(), _PARTS_DEPTH))


def parts(content: object, depth: int) -> Iterator[bytes]:
    """JSON in pieces; what is nested deeper than depth is one of them."""
    if not depth or not isinstance(content, dict | list):
        yield _dumped(content)
        return
    is_dict = isinstance(content, dict)
    yield b"{" if is_dict else b"["
    for index, item in enumerate(content):
        yield b"," if index else b""
        if is_dict:
            yield _dumped(item) + b":"
        yield from parts(content[item] if is_dict else item, depth - 1)
    yield b"}" if is_dict else b"]"


def _dumped(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def error_json(error: BatonError) -> Json:
    """OpenAI's error object, with what Baton knows beside it: stage, node and whether a retry makes sense."""
    content: Json = {"message": error.message, "type": _error_type(error.http_status), "param": error.param or None, "code": error.cause}
    known = {"stage": error.stage, "node": error.node, "retry_after_s": error.retry_after_s}
    return {"error": content | {name: value for name, value in known.items() if value} | {"retryable": error.retryable}}


def error_response(error: BatonError) -> Response:
    """An error in the place of an answer. Whoever is told to come back (429 always) is told when, in whole seconds.

    x-should-retry is for OpenAI's clients, which else send a request again by its status alone: what ends every node it meets, too.
    """
    response = Response(to_json(error_json(error)), error.http_status, media_type="application/json")
    if error.http_status == 429 or error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s or 1))
    if not error.retryable:
        response.headers["x-should-retry"] = "false"
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    return "invalid_request_error" if status < 500 else "server_error"
