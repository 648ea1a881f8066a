"""What goes wrong in a run, and when: drawn from a seed before anything runs. Pure; knows no process and no clock.

Process numbers and connections are known only at the time, so a plan names ranks, and a share that picks among what there is then.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
STOP_S = 20.0
# Below the silence after which a peer is dead, beyond that after which it is suspect, and far above both.
_HALF_OPEN_S = (2.0, 4.5, 15.0)
# Below and above what the chaos run allows a client (router.slow_client_s).
_SLOW_S = (2.0, 16.0)


class Kind(enum.StrEnum):
    """kill, stop: SIGKILL, SIGSTOP of a rank. router: SIGKILL of the router. cut: a TCP connection between two processes is shut down.

    half-open: one end of such a connection hears nothing for a while. full: more long requests at once than the pools hold.
    slow: a client that stops reading. leave: clients that go away in the middle. raylet: SIGKILL of a host's raylet and its processes.
    """

    KILL = "kill"
    STOP = "stop"
    ROUTER = "router"
    CUT = "cut"
    HALF_OPEN = "half-open"
    FULL = "full"
    SLOW = "slow"
    LEAVE = "leave"
    RAYLET = "raylet"


USUAL = tuple(kind for kind in Kind if kind is not Kind.RAYLET)
_ENDS_PROCESSES = (Kind.KILL, Kind.STOP)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. target: a rank's name, "" where it is chosen at the time, by `pick` (0 to 1).

    after_share: how much of the round's requests have started then, 0 to 1; delay_s later it strikes. hold_s: how long a stop, a
    half-open connection or a client's pause lasts. overlaps: the next fault comes before everything is in service again.
    """

    number: int
    kind: Kind
    target: str
    pick: float
    after_share: float
    delay_s: float
    hold_s: float
    overlaps: bool

    @property
    def role(self) -> str:
        """Of the target: "prefill", "decode" or ""."""
        return self.target.partition("-")[0]

    @property
    def label(self) -> str:
        """What it is counted under."""
        return f"{self.kind.value} {self.role}".strip()


def plan(num_faults: int, kinds: Sequence[Kind], ranks: Sequence[str], seed: int, overlap: float) -> tuple[Fault, ...]:
    """Every kind about equally often, in no order; of one kind, each rank about as often as any other.

    overlap: the share of faults after which the next one does not wait, 0 to 1.
    A router's death never overlaps: what it leaves is looked at when nothing else is going on.
    """
    chance = random.Random(f"faults {seed}")
    dealt = _dealt(kinds, num_faults, chance)
    targets = {kind: iter(_dealt(ranks, dealt.count(kind), chance)) for kind in _ENDS_PROCESSES}
    return tuple(
        Fault(
            number=number,
            kind=kind,
            target=next(targets[kind]) if kind in targets else "",
            pick=chance.random(),
            after_share=chance.uniform(0.2, 0.7),
            delay_s=chance.uniform(0.0, 0.4),
            hold_s=_hold_s(kind, chance),
            overlaps=chance.random() < overlap and Kind.ROUTER not in dealt[number : number + 2],
        )
        for number, kind in enumerate(dealt)
    )


def _dealt(items: Sequence[T], num: int, chance: random.Random) -> list[T]:
    """`num` of them, whole packs first, each pack shuffled."""
    cards: list[T] = []
    while len(cards) < num:
        cards += chance.sample(list(items), len(items))
    return cards[:num]


def _hold_s(kind: Kind, chance: random.Random) -> float:
    if kind is Kind.STOP:
        return STOP_S
    if kind is Kind.HALF_OPEN:
        return chance.choice(_HALF_OPEN_S)
    return chance.choice(_SLOW_S) if kind is Kind.SLOW else 0.0


@dataclass(slots=True)
class Record:
    """A fault that happened, at at_s on the clock of the run. Owner: whoever struck.

    target: what was struck, in words. skipped: why it could not be done. alone: no other node of the role was in service then.
    whole_s: seconds until everything was in service again, None if that was not waited for; `broken` if it did not come in time.
    survived: a stopped process that nobody had ended when it was let go on. note: what became of it.
    """

    fault: Fault
    at_s: float
    target: str = ""
    skipped: str = ""
    alone: bool = False
    whole_s: float | None = None
    broken: str = ""
    survived: bool = False
    note: str = ""
