"""For how long streams stood still, and after which fault. Pure: times of tokens and of faults in, figures out.

A pause is the time between two tokens of one stream, or from sending a request to its first token. It counts for a fault if it
covers the moment of it: what begins well after a fault, or ended before, has another reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from bench.chaos.faults import Kind, Record
from bench.chaos.said import Outcome, Try

# What was on its way when the fault struck still arrives.
_UNDER_WAY_S = 0.5
_SHORT_S = 0.05
LIMITS_S = {"kill decode": 3.0, "stop decode": 10.0}


@dataclass(frozen=True, slots=True)
class Pause:
    """of: the request's number. first: whether it is the wait for the first token."""

    from_s: float
    to_s: float
    of: int
    first: bool

    @property
    def length_s(self) -> float:
        """How long it was."""
        return self.to_s - self.from_s

    def covers(self, at_s: float) -> bool:
        """Whether the stream stood still when something struck at at_s."""
        return self.from_s <= at_s + _UNDER_WAY_S and self.to_s >= at_s


def pauses(outcomes: Iterable[Outcome]) -> list[Pause]:
    """Of all tries; those too short to be noticed left out."""
    found = [pause for outcome in outcomes for tried in outcome.tries for pause in _of_try(tried, outcome.ask.number)]
    return [pause for pause in found if pause.length_s > _SHORT_S]


def _of_try(tried: Try, number: int) -> list[Pause]:
    at_s = [tried.began_s, *tried.said.at_s]
    return [Pause(before, after, number, first=i == 0) for i, (before, after) in enumerate(pairwise(at_s))]


def alone_in_time(record: Record, records: Sequence[Record], pause_s: float) -> bool:
    """Whether no other fault struck while streams stood still after this one, or less than so long before it."""
    return not any(other is not record and abs(other.at_s - record.at_s) <= max(pause_s, _UNDER_WAY_S) for other in records)


@dataclass(frozen=True, slots=True)
class Effect:
    """What one fault did to the streams. struck: streams that were between two tokens then. pause_s: the longest pause of these, or 0.

    first_s: the longest wait for a first token. counts: whether the limit of its kind applies: a second node was in service, and no
    other fault was near.
    """

    record: Record
    num_struck: int
    pause_s: float
    first_s: float
    counts: bool


def effects(records: Sequence[Record], outcomes: Iterable[Outcome]) -> list[Effect]:
    """One per fault that was done, in their order."""
    found = pauses(outcomes)
    done = [record for record in records if not record.skipped]
    return [_effect(record, done, found) for record in done]


def _effect(record: Record, records: Sequence[Record], found: Sequence[Pause]) -> Effect:
    covering = [pause for pause in found if pause.covers(record.at_s)]
    between = [pause.length_s for pause in covering if not pause.first]
    longest = max(between, default=0.0)
    counts = not record.alone and record.fault.kind is not Kind.ROUTER and alone_in_time(record, records, longest)
    return Effect(record, len(between), longest, max((pause.length_s for pause in covering if pause.first), default=0.0), counts)


@dataclass(frozen=True, slots=True)
class Row:
    """All faults of one kind and role. whole_*: seconds until everything was in service again. limit_s: of the pause, None for none."""

    label: str
    num: int
    num_skipped: int
    num_struck: int
    pause_median_s: float
    pause_longest_s: float
    first_longest_s: float
    whole_median_s: float
    whole_longest_s: float
    limit_s: float | None
    over_limit: tuple[float, ...]


def rows(records: Sequence[Record], found: Sequence[Effect]) -> list[Row]:
    """By kind, in the order of their names."""
    return [_row(label, records, found) for label in sorted({record.fault.label for record in records})]


def _row(label: str, records: Sequence[Record], found: Sequence[Effect]) -> Row:
    mine = [effect for effect in found if effect.record.fault.label == label]
    whole = [effect.record.whole_s for effect in mine if effect.record.whole_s is not None]
    limit_s = LIMITS_S.get(label)
    return Row(
        label=label,
        num=len(mine),
        num_skipped=sum(bool(record.skipped) for record in records if record.fault.label == label),
        num_struck=sum(effect.num_struck for effect in mine),
        pause_median_s=median([effect.pause_s for effect in mine] or [0.0]),
        pause_longest_s=max((effect.pause_s for effect in mine), default=0.0),
        first_longest_s=max((effect.first_s for effect in mine), default=0.0),
        whole_median_s=median(whole or [0.0]),
        whole_longest_s=max(whole, default=0.0),
        limit_s=limit_s,
        over_limit=tuple(effect.pause_s for effect in mine if limit_s is not None and effect.counts and effect.pause_s > limit_s),
    )


def followed(pause: Pause, records: Sequence[Record]) -> str:
    """In words, the fault that a pause followed: one it covers, else the last one before it."""
    before = [record for record in records if not record.skipped and record.at_s <= pause.to_s]
    if not before:
        return "no fault"
    last = max(before, key=lambda record: (pause.covers(record.at_s), record.at_s))
    return f"{last.fault.label} ({last.target}), {max(0.0, pause.from_s - last.at_s):.1f} s after it"
