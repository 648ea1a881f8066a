"""One sequence's life in the router, pure: which attempts count, which tokens are new, when it is over.

Knows no nodes, clock, text or messages: it is told what was sent and what arrived, and says what may be delivered.

A dispatch takes one attempt number for prefill and one for decode; both are live until the next dispatch. Events of any
other attempt are dropped by rule, so late and doubled messages are harmless. A dispatch that is *alone* has no prefill: the
decode group computes the prompt itself.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import InternalError
from baton.lifecycle import Lifecycle
from baton.request import FinishReason, Sampling, SequenceRequest, TokenEvent, TokenLogprob


class Phase(enum.Enum):
    """Where a sequence is in its life; the last three are terminal."""

    IDLE = "idle"
    SENT = "sent"
    STREAMING = "streaming"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Signal(enum.Enum):
    """What can happen to a sequence."""

    DISPATCH = "dispatch"
    TOKEN = "token"
    SETBACK = "setback"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


class Loss(enum.Enum):
    """What the end of an attempt means for its sequence."""

    STALE = "stale"  # of an attempt that no longer counts
    HARMLESS = "harmless"  # prefill's part was over: decode has all it needs
    DECODE_ONLY = "decode only"  # another decode group may read the same lease
    WHOLE = "whole"  # both stages start again


class Delivery(NamedTuple):
    """Tokens output_index, output_index + 1, … of a sequence, each index delivered exactly once and in order."""

    output_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Dispatch:
    """What to send: the same sequence to both stages under two attempt numbers.

    prefill: None if alone. decode: None if prefill alone can finish the sequence. Never both.
    """

    prefill: SequenceRequest | None
    decode: SequenceRequest | None


_UNDER_WAY = (Phase.SENT, Phase.STREAMING)
_LIVE = (Phase.IDLE, *_UNDER_WAY)
REQUEST_LIFE = Lifecycle[Phase, Signal](
    "request",
    Phase.IDLE,
    {
        (Phase.IDLE, Signal.DISPATCH): Phase.SENT,
        (Phase.SENT, Signal.TOKEN): Phase.STREAMING,
        (Phase.STREAMING, Signal.TOKEN): Phase.STREAMING,
        (Phase.SENT, Signal.SETBACK): Phase.IDLE,
        (Phase.STREAMING, Signal.SETBACK): Phase.IDLE,
        (Phase.STREAMING, Signal.FINISH): Phase.FINISHED,
        **{(phase, Signal.FAIL): Phase.FAILED for phase in _LIVE},
        **{(phase, Signal.CANCEL): Phase.CANCELLED for phase in _LIVE},
    },
)


class SequenceLife:
    """State owner: the relay that drives this sequence.

    emitted_ids: every token delivered so far, by any attempt. A token that arrives ahead of its turn waits in a buffer of at
    most max_tokens entries; the buffer ends with its dispatch, for the next one computes from what was delivered.
    """

    def __init__(self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.phase = REQUEST_LIFE.start
        self.cached_tokens: int | None = None
        self.attempt = 0
        self._emitted: list[int] = []
        self._early: dict[int, tuple[int, TokenLogprob | None]] = {}
        self._finish: tuple[int, FinishReason] | None = None
        self._sent = Dispatch(None, None)
        self._first = 0  # output index at which the last dispatch began
        self._decode_heard = False

    @property
    def emitted_ids(self) -> tuple[int, ...]:
        """What has been delivered, from output index 0."""
        return tuple(self._emitted)

    @property
    def num_emitted(self) -> int:
        """How many tokens have been delivered."""
        return len(self._emitted)

    @property
    def over(self) -> bool:
        """Whether the sequence has had its end."""
        return self.phase not in _LIVE

    def step(self, signal: Signal) -> Phase:
        """Every change of phase goes through here. Raises InternalError for one that cannot be."""
        self.phase = REQUEST_LIFE.after(self.phase, signal)
        return self.phase

    def dispatch(self, *, alone: bool = False) -> Dispatch:
        """Start again from what was delivered, under new attempt numbers; all earlier ones are dropped from here on."""
        self.step(Signal.DISPATCH)
        self._early.clear()
        self._finish = None
        self._decode_heard = False
        self._first = len(self._emitted)
        prefill = None if alone else self._request()
        last_token = self.sampling.max_tokens - self._first == 1
        self._sent = Dispatch(prefill, None if prefill and last_token else self._request())
        return self._sent

    def redirect(self) -> SequenceRequest:
        """Another decode attempt on the lease of the last dispatch: it repeats that dispatch's first token like the one before."""
        assert self._sent.prefill is not None and self.phase in _UNDER_WAY
        decode = self._request()
        self._sent = Dispatch(self._sent.prefill, decode)
        return decode

    def lost(self, attempt: int, *, forgotten: bool = False) -> Loss:
        """What it means that `attempt` ended without a finish; changes nothing.

        forgotten: the node does not know the attempt, which may be because its part was over.
        """
        if not self._counts(attempt):
            return Loss.STALE
        if _is(self._sent.prefill, attempt):
            # Prefill forgets what was pulled; if it was not, the pull fails, and decode says so.
            pulled = forgotten and self._sent.decode is not None and len(self._emitted) > self._first
            return Loss.HARMLESS if self._decode_heard or pulled else Loss.WHOLE
        return Loss.WHOLE if self._decode_heard or self._sent.prefill is None else Loss.DECODE_ONLY

    def lacks(self, attempt: int, next_index: int) -> bool:
        """Whether something of what `attempt` has said, everything before next_index, has never arrived, from it or from another."""
        return self._counts(attempt) and any(index not in self._early for index in range(len(self._emitted), next_index))

    def awaits_decode(self, attempt: int) -> bool:
        """Whether `attempt` is the decode attempt under way and has not made a token yet."""
        return self._counts(attempt) and _is(self._sent.decode, attempt) and not self._decode_heard

    def setback(self) -> None:
        """The dispatch failed; another may follow."""
        self.step(Signal.SETBACK)

    def fail(self) -> None:
        """The sequence ends with an error."""
        self.step(Signal.FAIL)

    def cancel(self) -> None:
        """The sequence ends because nobody wants it any more (or a stop string was found)."""
        self.step(Signal.CANCEL)

    def receive(self, event: TokenEvent) -> Delivery | None:
        """Take one event and return what it makes deliverable, if anything.

        Raises InternalError if a node broke the protocol: an index where none was asked for, logprobs that do not match, a
        token other than the one that is known at its index (whoever says so goes on from what the client has not seen).
        """
        if not self._counts(event.attempt):
            return None
        self._check(event)
        self._decode_heard |= _is(self._sent.decode, event.attempt)
        if self.cached_tokens is None and event.cached_tokens is not None:
            self.cached_tokens = min(event.cached_tokens, len(self.prompt_ids))
        self._store(event)
        return self._deliver()

    def draw(self, attempt: int, output_index: int, token_id: int) -> Delivery | None:
        """`receive` of an event that holds one token and nothing else."""
        decode = self._sent.decode
        in_turn = output_index == len(self._emitted) < self.sampling.max_tokens - 1 and not self._early and self._finish is None
        if not in_turn or self.phase is not Phase.STREAMING or decode is None or decode.attempt != attempt:
            return self.receive(TokenEvent(self.request_id, attempt, output_index, (token_id,)))
        self._decode_heard = True
        self._emitted.append(token_id)
        return Delivery(output_index, (token_id,))

    def _request(self) -> SequenceRequest:
        self.attempt += 1
        return SequenceRequest(self.request_id, self.attempt, self.prompt_ids, self.sampling, tuple(self._emitted[: self._first]))

    def _counts(self, attempt: int) -> bool:
        """Whether what is said of `attempt` matters: it is one of the dispatch under way."""
        return self.phase in _UNDER_WAY and (_is(self._sent.prefill, attempt) or _is(self._sent.decode, attempt))

    def _check(self, event: TokenEvent) -> None:
        first, end = event.output_index, event.output_index + len(event.token_ids)
        most = self._first + 1 if _is(self._sent.prefill, event.attempt) else self.sampling.max_tokens
        if not self._first <= first < end <= most:
            raise self._nonsense(f"output tokens {first}..{end} where {self._first}..{most} were asked for")
        if event.logprobs and len(event.logprobs) != len(event.token_ids):
            raise self._nonsense(f"{len(event.logprobs)} logprobs for {len(event.token_ids)} tokens")
        if event.finish_reason is not None and end < len(self._emitted):
            raise self._nonsense(f"an end after {end} tokens, where {len(self._emitted)} have come")
        for index, token_id in enumerate(event.token_ids, first):
            known = self._known(index)
            if known not in (None, token_id):
                raise self._nonsense(f"token {token_id} at output index {index}, which is {known}")

    def _nonsense(self, what: str) -> InternalError:
        return InternalError(f"a node sent {what}, for {self.request_id}", cause="protocol")

    def _known(self, index: int) -> int | None:
        if index < len(self._emitted):
            return self._emitted[index]
        return self._early[index][0] if index in self._early else None

    def _store(self, event: TokenEvent) -> None:
        logprobs: tuple[TokenLogprob | None, ...] = event.logprobs or (None,) * len(event.token_ids)
        for index, item in enumerate(zip(event.token_ids, logprobs, strict=True), event.output_index):
            if index >= len(self._emitted):
                self._early.setdefault(index, item)
        if event.finish_reason is not None:
            self._finish = (event.output_index + len(event.token_ids), event.finish_reason)

    def _deliver(self) -> Delivery | None:
        first = len(self._emitted)
        ready: list[tuple[int, TokenLogprob | None]] = []
        while self._reason() is None and len(self._emitted) in self._early:
            ready.append(self._early.pop(len(self._emitted)))
            self._emitted.append(ready[-1][0])
        reason = self._reason()
        if not ready and reason is None:
            return None
        if ready:
            self.step(Signal.TOKEN)
        if reason is not None:
            self.step(Signal.FINISH)
        logprobs = tuple(logprob for _, logprob in ready if logprob is not None)
        return Delivery(first, tuple(token_id for token_id, _ in ready), logprobs, reason)

    def _reason(self) -> FinishReason | None:
        if self._finish is not None and self._finish[0] == len(self._emitted):
            return self._finish[1]
        return FinishReason.LENGTH if len(self._emitted) == self.sampling.max_tokens else None


def _is(request: SequenceRequest | None, attempt: int) -> bool:
    return request is not None and request.attempt == attempt
