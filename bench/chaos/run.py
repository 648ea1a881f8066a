"""A whole run: the requests undisturbed, then the same requests while one fault follows another. Knows the order; judges nothing.

The requests are dealt out evenly over the faults. In each round so many more may start; when some of them have, the fault strikes,
and the next round begins once everything is in service again, or at once where faults are to overlap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from baton.deadline import now_s
from baton.errors import InternalError
from bench.chaos.asks import Ask, Asked
from bench.chaos.faults import Fault, Kind, Record
from bench.chaos.guests import Guests
from bench.chaos.judge import Seen
from bench.chaos.load import GRACE_S, Load
from bench.chaos.said import Outcome, Said
from bench.chaos.scene import Scene
from bench.chaos.strike import REBUILD_S, Do, Striker, Struck

IDLE_S = 15.0
_LOOK_S = 1.0
# What was cut is noticed within this, so that a cluster that has not noticed does not count as whole.
_NOTICE_S = 0.5

Advance = Callable[[int], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run. deadline_s: of every request. timed: whether lengths of pauses are judged."""

    grpc: str
    http: str
    concurrency: int
    deadline_s: float
    timed: bool


async def undisturbed(settings: Settings, asks: Sequence[Ask], advance: Advance) -> dict[int, Said]:
    """What is answered when nothing goes wrong, by number. Raises InternalError if something does."""
    load = Load(settings.grpc, settings.http, asks, settings.deadline_s, lambda outcome: advance(1))
    await load.allow(len(asks))
    await load.run(settings.concurrency)
    for outcome in load.outcomes:
        if not outcome.last.finished:
            raise InternalError(f"request {outcome.ask.number} did not finish although nothing went wrong: {outcome.last.failed}")
    return {outcome.ask.number: outcome.last.said for outcome in load.outcomes}


class Disturbance:
    """The run under faults. State owner: the task that awaits `run`."""

    def __init__(self, settings: Settings, scene: Scene, asked: Asked, faults: Sequence[Fault], say: Say, advance: Advance) -> None:
        self._settings = settings
        self._scene = scene
        self._asked = asked
        self._faults = faults
        self._say = say
        self._records: list[Record] = []
        self._leaks: list[str] = []
        self._settling: list[asyncio.Task[None]] = []
        self._load = Load(settings.grpc, settings.http, asked.asks, settings.deadline_s, lambda outcome: advance(1))
        self._guests = Guests(settings.grpc, settings.http, asked.burst, settings.deadline_s)

    async def run(self, extra: Mapping[Kind, Do]) -> None:
        """Everything, until all requests have ended and nothing should be held any more. Raises the first BatonError of the keeper's."""
        try:
            await self._run(Striker(self._scene, self._guests, extra))
        except BaseExceptionGroup as failures:
            raise _first(failures) from failures
        await self._count("at the end")

    async def _run(self, striker: Striker) -> None:
        async with asyncio.TaskGroup() as group:
            clients = group.create_task(self._load.run(self._settings.concurrency))
            watch = group.create_task(self._watch())
            for fault in self._faults:
                await self._round(striker, fault)
            await asyncio.gather(*self._settling)
            await self._load.allow(len(self._asked.asks))
            await clients
            watch.cancel()

    async def _round(self, striker: Striker, fault: Fault) -> None:
        each = len(self._asked.asks) / len(self._faults)
        await self._load.allow(round((fault.number + 1) * each))
        await self._load.started(round((fault.number + fault.after_share) * each), self._patience_s)
        await asyncio.sleep(fault.delay_s)
        if fault.kind is Kind.ROUTER:
            await self._load.hold()
        struck = await striker.strike(fault)
        self._records.append(struck.record)
        if fault.kind is Kind.ROUTER:
            await self._after_death(struck)
        settling = asyncio.create_task(self._settle(struck))
        self._settling.append(settling)
        if not fault.overlaps:
            await asyncio.gather(*self._settling)

    async def _after_death(self, struck: Struck) -> None:
        """Without a router every client has an error at once, and soon the nodes hold nothing: looked at before anything is sent again."""
        if not await self._load.quiet(self._patience_s):
            self._leaks.append(f"after {struck.record.fault.label}: {self._load.num_running} clients still wait")
        await self._count(f"after the router's death at fault {struck.record.fault.number}")
        await self._load.go()

    async def _settle(self, struck: Struck) -> None:
        """Until the fault is over and everything is in service again."""
        record = struck.record
        await struck.over
        await asyncio.sleep(_NOTICE_S)
        missing = await self._scene.whole(REBUILD_S)
        record.broken = record.broken or missing
        record.whole_s = None if record.broken else now_s() - record.at_s
        self._say(_in_words(record))

    async def _count(self, when: str) -> None:
        self._leaks += [f"{when}: {held}" for held in await self._scene.leaks(IDLE_S)]

    async def _watch(self) -> None:
        while True:
            await self._scene.count_retries()
            await asyncio.sleep(_LOOK_S)

    @property
    def _patience_s(self) -> float:
        return self._settings.deadline_s + 2 * GRACE_S

    def seen(self, expected: Mapping[int, Said], num_differing: int | None) -> Seen:
        """All that is to be judged."""
        outcomes: list[Outcome] = [*self._load.outcomes, *self._guests.asked]
        full = sum(record.fault.kind is Kind.FULL for record in self._records)
        return Seen(
            expected=expected,
            outcomes=outcomes,
            bad=self._guests.bad,
            num_asked=len(self._asked.asks) + full * len(self._asked.burst),
            records=self._records,
            leaks=self._leaks,
            unbalanced=self._scene.unbalanced,
            retries=self._scene.retries(),
            deadline_s=self._settings.deadline_s,
            num_differing=num_differing,
            timed=self._settings.timed,
        )


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _in_words(record: Record) -> str:
    what = f"{record.fault.number}: {record.fault.kind.value} {record.target}".rstrip()
    if record.skipped:
        return f"{what}: skipped, {record.skipped}"
    after = f"in service again after {record.whole_s:.1f} s" if record.whole_s is not None else f"NOT in service again: {record.broken}"
    return ", ".join(filter(None, [what, record.note, after]))
