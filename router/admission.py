"""Which requests may come in, and what a client's sampling wishes come to. Pure: no clock, no nodes, no text.

`Admission` counts; the `check_…` functions and `resolve` refuse, with InvalidRequest naming the field and the numbers.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from baton.errors import InvalidRequest, ResourceExhausted
from baton.request import GenerateRequest, Sampling, SamplingAsked

SEED_MODULUS = 2**64
ROLES = frozenset({"system", "developer", "user", "assistant"})
Number = TypeVar("Number", int, float)


class Verdict(enum.Enum):
    """What becomes of a request at the door."""

    ADMIT = "admit"
    QUEUE = "queue"


class Admission:
    """At most max_running requests run and max_queue wait, first come, first served. State owner: the router's loop.

    Every request that entered must leave, whether it ran or gave up waiting: finished, failed, cancelled or past its deadline.
    """

    def __init__(self, max_running: int, max_queue: int, retry_after_s: float = 1.0) -> None:
        self._max_running = max_running
        self._max_queue = max_queue
        self._retry_after_s = retry_after_s
        self._running: set[str] = set()
        self._queue: dict[str, None] = {}

    @property
    def num_running(self) -> int:
        """Requests admitted and not over."""
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def enter(self, request_id: str) -> Verdict:
        """A new request: it may run, or it waits until `leave` names it. Raises ResourceExhausted if the queue is full."""
        assert request_id not in self._running
        assert request_id not in self._queue
        if len(self._running) < self._max_running:
            self._running.add(request_id)
            return Verdict.ADMIT
        if len(self._queue) >= self._max_queue:
            raise ResourceExhausted(
                f"{len(self._running)} requests run (at most {self._max_running}) and {len(self._queue)} wait (at most {self._max_queue})",
                stage="admission",
                cause="router_queue",
                retry_after_s=self._retry_after_s,
            )
        self._queue[request_id] = None
        return Verdict.QUEUE

    def leave(self, request_id: str) -> str | None:
        """A request is over, or waits no longer. Returns the one that is admitted in its place."""
        self._queue.pop(request_id, None)
        self._running.discard(request_id)
        if not self._queue or len(self._running) >= self._max_running:
            return None
        admitted = next(iter(self._queue))
        del self._queue[admitted]
        self._running.add(admitted)
        return admitted


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask. max_model_len: prompt plus answer, tokens; vocab_size: token ids are below it."""

    max_model_len: int
    vocab_size: int
    max_n: int = 128
    max_timeout_s: float = 3600.0
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_temperature: float = 100.0
    max_messages: int = 4096
    max_name_chars: int = 256


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Refuse what can be refused before the prompt is tokenised: names, messages, n, timeout, every sampling field.

    Every request passes here, whichever way it came: what the fronts refuse by themselves is only what has no place in a GenerateRequest.
    """
    _check_name("request_id", request.request_id, limits)
    _check_name("model", request.model, limits)
    _check_messages(request.prompt.messages or (), limits)
    _within("n", request.n, 1, limits.max_n)
    if request.timeout_s is not None:
        _finite("timeout_s", request.timeout_s)
        if not 0 < request.timeout_s <= limits.max_timeout_s:
            raise InvalidRequest(
                f"timeout_s must be more than 0 and at most {limits.max_timeout_s:g}, not {request.timeout_s:g}", param="timeout_s"
            )
    check_sampling(request.sampling, limits)


def check_sampling(asked: SamplingAsked, limits: Limits) -> None:
    """Refuse sampling fields out of range; what depends on the prompt's length is `resolve`'s."""
    _within("max_tokens", asked.max_tokens, 1, None)
    _within("min_tokens", asked.min_tokens, 0, None)
    _within("temperature", asked.temperature, 0, limits.max_temperature)
    _within("top_k", asked.top_k, -1, 2**31 - 1)
    _within("top_p", asked.top_p, 0, 1)
    if asked.top_p == 0:
        raise InvalidRequest("top_p must be more than 0", param="top_p")
    _within("min_p", asked.min_p, 0, 1)
    _within("seed", asked.seed, -(2**63), SEED_MODULUS - 1)
    _within("logprobs", asked.logprobs, 0, limits.max_logprobs)
    _check_stops(asked, limits)


def check_prompt(prompt_ids: Sequence[int], limits: Limits) -> None:
    """Refuse a prompt that is empty, leaves no room for an answer, or holds ids that are no tokens."""
    if not prompt_ids:
        raise InvalidRequest("prompt must have at least 1 token, it has none", param="prompt")
    if len(prompt_ids) >= limits.max_model_len:
        raise InvalidRequest(
            f"prompt has {len(prompt_ids)} tokens; with an answer of at least 1 token that is more than the {limits.max_model_len} "
            "tokens that fit",
            cause="context_length_exceeded",
            param="prompt",
        )
    _check_ids("prompt", prompt_ids, limits.vocab_size)


def resolve(
    asked: SamplingAsked,
    defaults: SamplingAsked,
    eos_ids: Sequence[int],
    *,
    prompt_len: int,
    max_model_len: int,
    default_max_tokens: int | None,
    drawn_seed: int,
) -> Sampling:
    """The client's wishes with every default applied; call it after `check_prompt` and `check_sampling`.

    defaults: the model's own (generation_config.json), where the client said nothing. default_max_tokens: when max_tokens
    was not asked, clipped to the remaining context, which is also what None means. An explicit max_tokens that does not fit
    is refused. Seeds are taken modulo 2**64. Sequence i of a request samples with seed + i: see `sequence_seed`.
    """
    min_tokens = _first(asked.min_tokens, defaults.min_tokens, 0)
    max_tokens = _max_tokens(asked, prompt_len, max_model_len, default_max_tokens)
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens {min_tokens} is more than max_tokens {max_tokens}", param="min_tokens")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_first(asked.temperature, defaults.temperature, 1.0),
        top_k=max(0, _first(asked.top_k, defaults.top_k, 0)),
        top_p=_first(asked.top_p, defaults.top_p, 1.0),
        min_p=_first(asked.min_p, defaults.min_p, 0.0),
        seed=_first(asked.seed, defaults.seed, drawn_seed) % SEED_MODULUS,
        stop_token_ids=_stop_ids(asked, eos_ids),
        num_logprobs=asked.logprobs,
    )


def sequence_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request with n > 1."""
    return (seed + index) % SEED_MODULUS


def _check_name(field: str, name: str, limits: Limits) -> None:
    if len(name) > limits.max_name_chars or not name.isprintable():
        raise InvalidRequest(f"{field} may have {limits.max_name_chars} printable characters, not {len(name)}: {name[:40]!r}", param=field)


def _check_messages(messages: Sequence[Mapping[str, str]], limits: Limits) -> None:
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"there are {len(messages)} messages, at most {limits.max_messages} are allowed", param="messages")
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            role = message.get("role", "")[:40]
            raise InvalidRequest(f"role must be one of {', '.join(sorted(ROLES))}, not {role!r}", param=f"messages.{index}.role")


def _first(asked: Number | None, default: Number | None, otherwise: Number) -> Number:
    if asked is not None:
        return asked
    return otherwise if default is None else default


def _max_tokens(asked: SamplingAsked, prompt_len: int, max_model_len: int, default: int | None) -> int:
    left = max_model_len - prompt_len
    if asked.max_tokens is None:
        return left if default is None else min(default, left)
    if asked.max_tokens > left:
        raise InvalidRequest(
            f"max_tokens {asked.max_tokens} and {prompt_len} prompt tokens make {asked.max_tokens + prompt_len}, "
            f"at most {max_model_len} fit; ask for at most {left}",
            cause="context_length_exceeded",
            param="max_tokens",
        )
    return asked.max_tokens


def _stop_ids(asked: SamplingAsked, eos_ids: Sequence[int]) -> tuple[int, ...]:
    ends = () if asked.ignore_eos else tuple(eos_ids)
    return tuple(dict.fromkeys((*ends, *asked.stop_token_ids)))


def _check_stops(asked: SamplingAsked, limits: Limits) -> None:
    if len(asked.stop) > limits.max_stop_strings:
        raise InvalidRequest(f"stop has {len(asked.stop)} strings, at most {limits.max_stop_strings} are allowed", param="stop")
    for stop in asked.stop:
        if not 1 <= len(stop) <= limits.max_stop_chars:
            raise InvalidRequest(f"stop has a string of {len(stop)} characters, 1 to {limits.max_stop_chars} are allowed", param="stop")
    if len(asked.stop_token_ids) > limits.max_stop_token_ids:
        raise InvalidRequest(
            f"stop_token_ids has {len(asked.stop_token_ids)} ids, at most {limits.max_stop_token_ids} are allowed", param="stop_token_ids"
        )
    _check_ids("stop_token_ids", asked.stop_token_ids, limits.vocab_size)


def _check_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise InvalidRequest(f"{field} holds {wrong}, token ids are 0 to {vocab_size - 1}", param=field)


def _within(field: str, value: float | None, least: float, most: float | None) -> None:
    if value is None:
        return
    _finite(field, value)
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise InvalidRequest(f"{field} must be {allowed}, not {value}", param=field)


def _finite(field: str, value: float) -> None:
    if not -math.inf < value < math.inf:
        raise InvalidRequest(f"{field} must be a finite number, not {value}", param=field)
