"""Whether the promises held. Pure: what was expected and what came in, findings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from bench.chaos.asks import Ask
from bench.chaos.faults import Kind, Record
from bench.chaos.load import GRACE_S
from bench.chaos.pauses import Pause, Row, effects, followed, pauses, rows
from bench.chaos.said import Failed, Flaw, Outcome, Said, Try, flaw_of, num_same

# A connection that breaks because the router died is noticed at once, and a request sent until its successor listens finds nobody.
_AROUND_DEATH_S = 2.0
_MAX_EXAMPLES = 5
_DEVIATIONS = 3


@dataclass(frozen=True, slots=True)
class Doubt:
    """After `before`, the undisturbed run had the token `expected`, and a disturbed one `found`."""

    ask: Ask
    before: tuple[int, ...]
    expected: int
    found: int


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything of a run. outcomes: requests that are owed an answer. bad: of clients that left or stopped reading.

    leaks: what ranks held when nothing ran, after each router's death and at the end. retries: of the router, by cause.
    expected: undisturbed answers by number. num_differing: requests whose answers differed between two undisturbed runs; None where
    none may differ, nor its logprobs.
    ties: differences that mean nothing, since there the model itself cannot tell which token it is (ties.py).
    """

    expected: Mapping[int, Said]
    outcomes: Sequence[Outcome]
    bad: Sequence[Outcome]
    num_asked: int
    records: Sequence[Record]
    leaks: Sequence[str]
    unbalanced: Sequence[str]
    retries: Mapping[str, int]
    deadline_s: float
    num_differing: int | None
    timed: bool
    ties: frozenset[Doubt] = frozenset()


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise. broken: how often, and the first examples in words."""

    says: str
    broken: int
    examples: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether it was kept."""
        return self.broken == 0


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything worth knowing. num_excused: tries that ended because the router died; num_alone: of these, that found it dead already.

    longest: the longest pauses of all, each with the fault it followed."""

    num_requests: int
    num_finished: int
    num_resumed: int
    num_dispatched_again: int
    num_excused: int
    num_alone: int
    num_refused: int
    num_ties: int
    flaws: dict[str, int]
    errors: dict[str, int]
    retries: dict[str, int]
    rows: tuple[Row, ...]
    longest: tuple[str, ...]
    promises: tuple[Promise, ...]

    @property
    def passed(self) -> bool:
        """Whether every promise held."""
        return all(promise.holds for promise in self.promises)


def judged(seen: Seen) -> Findings:
    """All figures and promises of a run."""
    found = effects(seen.records, seen.outcomes)  # who stops reading stands still by itself
    table = rows(seen.records, found)
    flaws = _flaws(seen)
    tries = [tried for outcome in seen.outcomes for tried in outcome.tries]
    broke = [tried for tried in tries if excused(tried, seen.records)]
    return Findings(
        num_requests=len(seen.outcomes),
        num_finished=sum(outcome.last.finished for outcome in seen.outcomes),
        num_resumed=sum(_resumed(outcome) for outcome in seen.outcomes),
        num_dispatched_again=sum(seen.retries.values()),
        num_excused=len(broke),
        num_alone=sum(not _under_way_at_death(tried, seen.records) for tried in broke),
        num_refused=sum(tried.failed is not None and tried.failed.refused for tried in tries),
        num_ties=len(seen.ties),
        flaws=dict(Counter(flawed.flaw.value for flawed in flaws)),
        errors=dict(Counter(_in_words(tried.failed) for tried in tries if tried.failed)),
        retries=dict(seen.retries),
        rows=tuple(table),
        longest=_longest(pauses(seen.outcomes), seen.records),
        promises=_promises(seen, flaws, table),
    )


def excused(tried: Try, records: Sequence[Record]) -> bool:
    """Whether a try ended with an error because the router died: the one error a client may see."""
    if tried.failed is None or not tried.failed.broken:
        return False
    return any(death.at_s <= tried.ended_s and tried.began_s <= _back_s(death) for death in _deaths(records))


def _under_way_at_death(tried: Try, records: Sequence[Record]) -> bool:
    return any(tried.began_s <= death.at_s <= tried.ended_s for death in _deaths(records))


def _deaths(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.fault.kind is Kind.ROUTER and not record.skipped]


def _back_s(record: Record) -> float:
    return record.at_s + (record.whole_s or 0.0) + _AROUND_DEATH_S


def doubts(seen: Seen) -> list[Doubt]:
    """Every place where an answer has another token than the undisturbed one, for the first time."""
    found = [_doubt(outcome.ask, seen.expected[outcome.ask.number], tried) for outcome, tried in _every_try(seen)]
    return [doubt for doubt in found if doubt is not None]


def _doubt(ask: Ask, expected: Said, tried: Try) -> Doubt | None:
    same = num_same(expected.token_ids, tried.said.token_ids)
    if same == min(len(expected.token_ids), len(tried.said.token_ids)):
        return None
    return Doubt(ask, tuple(expected.token_ids[:same]), expected.token_ids[same], tried.said.token_ids[same])


def _every_try(seen: Seen) -> list[tuple[Outcome, Try]]:
    return [(outcome, tried) for outcome in (*seen.outcomes, *seen.bad) for tried in outcome.tries]


@dataclass(frozen=True, slots=True)
class _Flawed:
    number: int
    flaw: Flaw
    example: str


def _flaws(seen: Seen) -> list[_Flawed]:
    flaws: list[_Flawed] = []
    for outcome, tried in _every_try(seen):
        expected, number = seen.expected[outcome.ask.number], outcome.ask.number
        flaw = flaw_of(expected, tried, exact=seen.num_differing is None)
        if flaw is not None and _doubt(outcome.ask, expected, tried) not in seen.ties:
            flaws.append(_Flawed(number, flaw, f"request {number}: {flaw.value}, {_differing(expected, tried)}"))
    return flaws


def _right(seen: Seen, flaws: Sequence[_Flawed]) -> Promise:
    """That answers are those of the undisturbed run; where two of these differ, that faults add no more than chance may.

    Of two counts with the same mean n, the difference has a standard deviation of about the root of 2 n.
    """
    numbers = {flawed.number for flawed in flaws}
    examples = tuple(flawed.example for flawed in flaws[:_MAX_EXAMPLES])
    if seen.num_differing is None:
        return Promise("no answer differs from the undisturbed run", len(numbers), examples)
    most = seen.num_differing + int(_DEVIATIONS * sqrt(2 * seen.num_differing))
    says = f"{len(numbers)} answers differ from the undisturbed run, no more than the {seen.num_differing} of a second such run and chance"
    return Promise(f"{says} (at most {most})", max(0, len(numbers) - most), examples)


def _differing(expected: Said, tried: Try) -> str:
    found, same = tried.said, num_same(expected.token_ids, tried.said.token_ids)
    said, wanted = found.token_ids[same : same + 6], expected.token_ids[same : same + 6]
    at = f"from token {same}: {said} for {wanted}" if said or wanted else "no token differs"
    lengths = f"{len(found.token_ids)} tokens for {len(expected.token_ids)}"
    return f"{lengths}, {at}, {found.finish_reason or 'unfinished'}, served by {', '.join(found.served_by) or 'unknown'}"


def _resumed(outcome: Outcome) -> bool:
    """Whether two groups of one role made its tokens. Over HTTP nobody says which groups they were."""
    roles = [Counter(name.partition("-")[0] for name in tried.said.served_by) for tried in outcome.tries]
    return any(number > 1 for groups in roles for number in groups.values())


def _longest(found: Sequence[Pause], records: Sequence[Record]) -> tuple[str, ...]:
    between = sorted((pause for pause in found if not pause.first), key=lambda pause: -pause.length_s)
    return tuple(f"{pause.length_s:.2f} s, request {pause.of}, after {followed(pause, records)}" for pause in between[:_MAX_EXAMPLES])


def _promises(seen: Seen, flaws: Sequence[_Flawed], table: Sequence[Row]) -> tuple[Promise, ...]:
    held = [
        _promise("every request ended", _lost(seen)),
        _promise("no request was past its deadline without an answer", _late(seen)),
        _promise("every request finished", _unfinished(seen)),
        _promise("no error but the router's death and full pools", _errors(seen)),
        _right(seen, flaws),
        _promise("no block, lease, pull or sequence was left when nothing ran", seen.leaks),
        _promise("blocks always added up", seen.unbalanced),
        _promise("everything was in service again after every fault", [f"{r.fault.label}: {r.broken}" for r in seen.records if r.broken]),
        _promise("stopped ranks were ended", [f"{r.target}: {r.note}" for r in seen.records if r.survived]),
    ]
    return (*held, *_limits(table)) if seen.timed else tuple(held)


def _limits(table: Sequence[Row]) -> list[Promise]:
    return [
        Promise(
            f"no stream stood still for more than {row.limit_s:g} s after {row.label}, with a second node in service",
            len(row.over_limit),
            tuple(f"{pause_s:.2f} s" for pause_s in row.over_limit[:_MAX_EXAMPLES]),
        )
        for row in table
        if row.limit_s is not None
    ]


def _promise(says: str, examples: Sequence[str]) -> Promise:
    return Promise(says, len(examples), tuple(examples[:_MAX_EXAMPLES]))


def _lost(seen: Seen) -> list[str]:
    silent = [f"request {outcome.ask.number}: silence" for outcome in (*seen.outcomes, *seen.bad) if any(t.silent for t in outcome.tries)]
    missing = seen.num_asked - len(seen.outcomes)
    return [*silent, *[f"{missing} requests never ended"] * bool(missing)]


def _late(seen: Seen) -> list[str]:
    tries = [(outcome.ask.number, tried) for outcome in seen.outcomes for tried in outcome.tries if not tried.silent]
    late = [(number, tried.ended_s - tried.began_s) for number, tried in tries]
    return [f"request {number}: answered after {took_s:.1f} s" for number, took_s in late if took_s > seen.deadline_s + GRACE_S / 2]


def _unfinished(seen: Seen) -> list[str]:
    ended = [outcome for outcome in seen.outcomes if not outcome.last.finished]
    return [f"request {outcome.ask.number}: {_in_words(outcome.last.failed)}" for outcome in ended]


def _errors(seen: Seen) -> list[str]:
    tries = [(outcome.ask.number, tried) for outcome in seen.outcomes for tried in outcome.tries]
    return [
        f"request {number}: {_in_words(tried.failed)}: {tried.failed.message}"
        for number, tried in tries
        if tried.failed and not tried.failed.refused and not excused(tried, seen.records)
    ]


def _in_words(failed: Failed | None) -> str:
    if failed is None:
        return "silence"
    return f"{failed.cause} ({failed.stage or 'the connection'}{', ' + failed.node if failed.node else ''})"
