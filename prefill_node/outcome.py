"""What a prefill scheduler says about a step and about itself: plain values, carried out by the leader."""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.sequence import Key
from baton.request import TokenEvent


@dataclass(frozen=True, slots=True)
class Announced:
    """Blocks first_block, first_block + 1, … of a lease's prompt are readable now: (block, generation) of each.

    final is the token drawn after the prompt, on the last announcement only. A request that ends with it while nobody
    pulls announces no blocks: they are given up in the same step.
    """

    lease: int
    first_block: int
    blocks: tuple[tuple[int, int], ...]
    final: TokenEvent | None = None


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a step brought.

    ended: leases whose blocks were given up; a pull that comes for one finds it gone. failed: attempts for which no token could be drawn.
    """

    events: tuple[TokenEvent, ...] = ()
    announcements: tuple[Announced, ...] = ()
    ended: tuple[int, ...] = ()
    failed: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """Prompts waiting and being computed, tokens these still have to compute, leases whose blocks are held."""

    waiting: int
    running: int
    waiting_tokens: int
    leases: int
