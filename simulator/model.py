"""A language model that costs nothing: what a token leaves in its slot, and which token follows what is found in the slots.

A slot holds a hash of the slot before it and of its own token, as a KV cache holds what a token makes of all before it. The next token
is a hash of *every* slot of the context, so that one wrong, stale or half-copied block shows in what is generated. Pure; knows no blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.request import FinishReason, Sampling

FIRST_ID, NUM_IDS = 32, 95  # printable ASCII: a token's text is one character
EOS_ID = 257
VOCAB_SIZE = 258
EOS_ODDS = 23  # one token in so many ends the answer
ROOT = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def slot_after(before: int, token_id: int) -> int:
    """What a token leaves in its slot, after what is in the slot before it."""
    mixed = ((before ^ (token_id + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & _MASK
    return mixed ^ (mixed >> 29)


def next_token(slots: tuple[int, ...], *, greedy: bool, seed: int, output_index: int, banned_ids: Iterable[int] = ()) -> int:
    """The token after a context. seed and output_index do not matter to a greedy choice."""
    luck = hash((slots, 0, 0) if greedy else (slots, seed, output_index)) & _MASK
    banned = frozenset(banned_ids)
    if luck % EOS_ODDS == 0 and EOS_ID not in banned:
        return EOS_ID
    drawn = luck // EOS_ODDS % NUM_IDS
    return next(token_id for step in range(NUM_IDS) if (token_id := FIRST_ID + (drawn + step) % NUM_IDS) not in banned)


def logprob_of(slots: tuple[int, ...], token_id: int) -> float:
    """A number that only this token after this context has; exact in fp32."""
    return -(hash((slots, token_id)) & 0xFFFF) / 4096


@dataclass(frozen=True, slots=True)
class Expected:
    """What an undisturbed run answers. text: without what ended it, and without special tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str


def answer(prompt_ids: Sequence[int], sampling: Sampling, stop: str = "") -> Expected:
    """The whole answer to a prompt, computed from nothing else. stop: a string that ends it, if it appears."""
    slots: list[int] = []
    for token_id in prompt_ids:
        slots.append(slot_after(slots[-1] if slots else ROOT, token_id))
    token_ids: list[int] = []
    logprobs: list[float] = []
    text, reason = "", None
    while reason is None:
        found = tuple(slots)
        banned = sampling.stop_token_ids if len(token_ids) < sampling.min_tokens else ()
        greedy = sampling.temperature == 0
        token_id = next_token(found, greedy=greedy, seed=sampling.seed, output_index=len(token_ids), banned_ids=banned)
        token_ids.append(token_id)
        logprobs.append(logprob_of(found, token_id))
        slots.append(slot_after(slots[-1], token_id))
        reason = sampling.finish(len(token_ids), token_id)
        text += "" if token_id == EOS_ID else chr(token_id)
        if stop and stop in text:
            return Expected(tuple(token_ids), tuple(logprobs), FinishReason.STOP, text[: text.index(stop)])
    return Expected(tuple(token_ids), tuple(logprobs), reason, text)
