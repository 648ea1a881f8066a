"""What a decode scheduler says about sequences and about itself: plain values, carried out by the leader."""

from __future__ import annotations

from dataclasses import dataclass

from baton.request import Drawn, SequenceRequest, TokenEvent


@dataclass(frozen=True, slots=True)
class Admitted:
    """Room is reserved for this attempt. Of its num_blocks prompt blocks the first matched_blocks are here already."""

    request: SequenceRequest
    matched_blocks: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What a step brought. drawn: tokens with nothing to be said beside them; events: the others, which end their sequence, carry
    logprobs, or come first after a prompt that was computed here."""

    drawn: Drawn
    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Sequences waiting for blocks, admitted or pulling, computing their prompts, and running.

    waiting_tokens: prompt tokens of those waiting, and those still to be computed here.
    """

    waiting: int
    pulling: int
    computing: int
    running: int
    waiting_tokens: int
