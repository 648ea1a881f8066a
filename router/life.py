"""One sequence's life in the router, pure: which attempts count, which tokens are new, when it is over.

Knows no nodes, clock, text or messages: it is told what was sent and what arrived, and says what may be delivered.

    IDLE ──dispatch──▶ SENT ──token──▶ STREAMING ──finish──▶ FINISHED
     ▲                  │                 │
     └────setback───────┴─────────────────┘        any of the three ──fail──▶ FAILED, ──cancel──▶ CANCELLED

A dispatch takes one attempt number for prefill and one for decode; both are live until the next dispatch. Events of any
other attempt are dropped by rule, so late and doubled messages are harmless.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.errors import InternalError
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


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens output_index, output_index + 1, … of a sequence, each index delivered exactly once and in order."""

    output_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Dispatch:
    """What to send: the same sequence to both stages under two attempt numbers; decode None if prefill alone can finish it."""

    prefill: SequenceRequest
    decode: SequenceRequest | None


_UNDER_WAY = (Phase.SENT, Phase.STREAMING)
_LIVE = (Phase.IDLE, *_UNDER_WAY)
_NEXT: dict[tuple[Phase, Signal], Phase] = {
    (Phase.IDLE, Signal.DISPATCH): Phase.SENT,
    (Phase.SENT, Signal.TOKEN): Phase.STREAMING,
    (Phase.STREAMING, Signal.TOKEN): Phase.STREAMING,
    (Phase.SENT, Signal.SETBACK): Phase.IDLE,
    (Phase.STREAMING, Signal.SETBACK): Phase.IDLE,
    (Phase.STREAMING, Signal.FINISH): Phase.FINISHED,
    **{(phase, Signal.FAIL): Phase.FAILED for phase in _LIVE},
    **{(phase, Signal.CANCEL): Phase.CANCELLED for phase in _LIVE},
}


class SequenceLife:
    """State owner: the relay that drives this sequence.

    emitted_ids: every token delivered so far, by any attempt. A token that arrives ahead of its turn waits in a buffer of at
    most max_tokens entries; the buffer ends with its dispatch, for the next one computes from what was delivered.
    """

    def __init__(self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.phase = Phase.IDLE
        self.cached_tokens: int | None = None
        self.attempt = 0
        self._emitted: list[int] = []
        self._early: dict[int, tuple[int, TokenLogprob | None]] = {}
        self._finish: tuple[int, FinishReason] | None = None
        self._sent: Dispatch | None = None
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
        """Every change of phase goes through here; one that cannot be is a bug."""
        assert (self.phase, signal) in _NEXT, f"{self.request_id}: {signal.value} while {self.phase.value}"
        self.phase = _NEXT[self.phase, signal]
        return self.phase

    def dispatch(self) -> Dispatch:
        """Start again from what was delivered, under new attempt numbers; all earlier ones are dropped from here on."""
        self.step(Signal.DISPATCH)
        self._early.clear()
        self._finish = None
        self._decode_heard = False
        alone = self.sampling.max_tokens - len(self._emitted) == 1
        prefill = self._request(self.emitted_ids)
        self._sent = Dispatch(prefill, None if alone else self._request(prefill.emitted_ids))
        return self._sent

    def redirect(self) -> SequenceRequest:
        """Another decode attempt on the lease of the last dispatch: it repeats that dispatch's first token like the one before."""
        assert self._sent is not None and self.phase in _UNDER_WAY
        decode = self._request(self._sent.prefill.emitted_ids)
        self._sent = Dispatch(self._sent.prefill, decode)
        return decode

    def lost(self, attempt: int) -> Loss:
        """What it means that `attempt` ended without a finish; changes nothing."""
        if self.phase not in _UNDER_WAY or attempt not in self._live_attempts():
            return Loss.STALE
        assert self._sent is not None
        if attempt == self._sent.prefill.attempt:
            return Loss.HARMLESS if self._decode_heard else Loss.WHOLE
        base = len(self._sent.prefill.emitted_ids)
        return Loss.DECODE_ONLY if not self._decode_heard and len(self._emitted) <= base + 1 else Loss.WHOLE

    def awaits_decode(self, attempt: int) -> bool:
        """Whether `attempt` is the decode attempt under way and has not made a token yet."""
        decode = self._sent.decode if self._sent and self.phase in _UNDER_WAY else None
        return decode is not None and decode.attempt == attempt and not self._decode_heard

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

        Raises InternalError if a node broke the protocol: an index outside max_tokens, logprobs that do not match.
        """
        if self.phase not in _UNDER_WAY or event.attempt not in self._live_attempts():
            return None
        assert self._sent is not None
        self._check(event)
        self._decode_heard |= self._sent.decode is not None and event.attempt == self._sent.decode.attempt
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        self._store(event)
        return self._deliver()

    def _request(self, emitted_ids: tuple[int, ...]) -> SequenceRequest:
        self.attempt += 1
        return SequenceRequest(self.request_id, self.attempt, self.prompt_ids, self.sampling, emitted_ids)

    def _live_attempts(self) -> tuple[int, ...]:
        assert self._sent is not None, "nothing is live before the first dispatch"
        decode = self._sent.decode
        return (self._sent.prefill.attempt,) if decode is None else (self._sent.prefill.attempt, decode.attempt)

    def _check(self, event: TokenEvent) -> None:
        assert self._sent is not None
        first, end = len(self._sent.prefill.emitted_ids), event.output_index + len(event.token_ids)
        if not event.token_ids or event.output_index < first or end > self.sampling.max_tokens:
            raise InternalError(
                f"a node sent output tokens {event.output_index}..{end} of {self.request_id} "
                f"where {first}..{self.sampling.max_tokens} were asked for"
            )
        if event.logprobs and len(event.logprobs) != len(event.token_ids):
            raise InternalError(f"a node sent {len(event.logprobs)} logprobs for {len(event.token_ids)} tokens of {self.request_id}")

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
        while len(self._emitted) in self._early:
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
