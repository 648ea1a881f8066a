"""One schedule from its first event to its last: builds the world, lets it happen, and says what came of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from baton.errors import BatonError
from baton.telemetry import LineFormatter
from simulator.cluster import SimCluster
from simulator.engine import Violation
from simulator.faults import Faults
from simulator.groups import MakeLeader, make_leader
from simulator.invariants import Record
from simulator.link import Weather
from simulator.loop import Stuck, VirtualLoop
from simulator.network import Network
from simulator.router import ADDRESS
from simulator.schedule import Ask, Schedule, schedule
from simulator.service import Client
from simulator.stream import Stream

READY_S = 60.0
SETTLE_S = 45.0
LOSSY_SETTLE_S = 240.0  # until the deadline of a request whose Cancel was lost
LOOK_S = 0.25
COLLECT_EVERY = 25  # worlds between two collections of garbage
LOGGERS = ("router", "ranks", "prefill_node", "decode_node", "kv_transfer", "baton", "simulator")


@dataclass(slots=True)
class Report:
    """What came of one seed. error: the promise that was broken, "" if none was. digest: equal only for equal runs."""

    seed: int
    season: str = ""
    error: str = ""
    digest: int = 0
    virtual_s: float = 0.0
    num_events: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class World:
    """State owner: whoever calls `run`, once. tell: where a readable trace goes; None for none."""

    def __init__(self, plan: Schedule, make_leader: MakeLeader = make_leader, tell: Callable[[str], None] | None = None) -> None:
        self.loop = VirtualLoop()
        self.plan = plan
        self.chance = random.Random(~plan.seed)
        self.network = Network(self.loop, plan.weather, self.chance)
        self.report = Report(plan.seed, plan.season)
        self._tell = tell
        self.network.note = self._note_item if tell is not None else None
        clients = self.loop.process("clients", 17)
        self.network.calm[clients] = Weather(window=1)
        self.client = Client(self.network, clients, ADDRESS, lambda: self.cluster.absent, plan)
        self.cluster = SimCluster(self.network, plan, self.chance, make_leader)
        self.cluster.on_router_lost = self._excuse
        self.faults = Faults(self.cluster, self.note)

    def run(self) -> Report:
        """Let it happen. What goes wrong is in the report."""
        report = self.report
        try:
            self.loop.run(self._happen())
        except (Violation, Stuck) as error:
            report.error = f"{type(error).__name__}: {error}"
        except Exception as error:  # the edge of a world: any error is a finding
            report.error = f"{type(error).__name__}: {error!r} {_where(error)}"
        report.virtual_s, report.num_events, report.digest = self.loop.now_s, self.loop.num_events, self.loop.digest
        self.loop.close()
        if not report.error and self.loop.failures:
            report.error = f"unseen: {self.loop.failures[0]!r}"
        self._count()
        return report

    async def _happen(self) -> None:
        await self._until(self.cluster.whole, READY_S, lambda: [self.cluster.router.dispatcher.fleet.registry.summary()])
        self.note("the cluster is ready")
        asks = [self.client.process.spawn(self._ask_at(ask), "ask") for ask in self.plan.asks]
        await asyncio.gather(self.faults.run(self.plan.faults), *asks)
        self.note("all requests have ended; faults end now")
        self.faults.end()
        settle_s = LOSSY_SETTLE_S if self.plan.lossy else SETTLE_S
        await self._until(lambda: self.cluster.whole() and not self.cluster.leftovers(), settle_s, self._wrong)
        await self._last_request()
        await self._until(lambda: not self.cluster.leftovers(), SETTLE_S, self._wrong)
        for group in self.cluster.groups():
            group.leader.pool.check()

    async def _ask_at(self, ask: Ask) -> Record:
        await asyncio.sleep(ask.at_s)
        return await self.client.ask(ask)

    async def _last_request(self) -> None:
        """When all faults are over, a request is served like any other."""
        ask = Ask(0.0, tuple(range(40, 51)), max_tokens=3, timeout_s=30.0, ignore_eos=True)
        record = await self.client.process.spawn(self.client.ask(ask))
        if record.outcome != "finished":
            raise Violation(f"the last request came to {record.outcome}")

    async def _until(self, holds: Callable[[], bool], within_s: float, wrong: Callable[[], list[str]]) -> None:
        until_s = self.loop.now_s + within_s
        while not holds():
            if self.loop.now_s > until_s:
                raise Violation(f"after {within_s:g} s without faults: {'; '.join(wrong())}")
            await asyncio.sleep(LOOK_S)

    def _wrong(self) -> list[str]:
        summary = self.cluster.router.dispatcher.fleet.registry.summary()
        return [*self.cluster.leftovers(), *([] if self.cluster.whole() else [summary])]

    def _excuse(self) -> None:
        """The router is not there: whoever waits for it may be told so, or late."""
        for record in self.client.records:
            record.excused |= not record.outcome

    def _count(self) -> None:
        report = self.report
        report.faults = self.faults.done
        report.counts += self.cluster.counts
        report.counts += Counter(self.cluster.router.counted())
        report.counts += Counter({f"messages {what}": count for what, count in self.network.counts.items()})
        for record in self.client.records:
            report.counts[f"outcome {record.outcome or 'none'}"] += 1
        report.counts["blocks read"] = sum(group.reader.num_blocks_read for group in self.cluster.groups_ever)
        report.counts["prompts alone"] = sum(group.seat.num_alone for group in self.cluster.groups_ever)

    def note(self, what: str) -> None:
        if self._tell is not None:
            self._tell(f"{self.loop.now_s:10.4f}  {what}")

    def _note_item(self, stream: Stream, arrow: str, item: object) -> None:
        what = " ".join(str(item).split()) or type(item).__name__
        method = stream.method.rsplit("/", 1)[-1]
        self.note(f"{stream.link.near.name} {arrow} {stream.link.far.name} #{stream.number} {method}: {what}")


def _where(error: BaseException) -> str:
    """The last line of ours that an error passed."""
    at = error.__traceback__
    where = ""
    while at is not None:
        where = f"({at.tb_frame.f_code.co_filename.rsplit('/', 2)[-2:]}:{at.tb_lineno})"
        at = at.tb_next
    return where


class Simulator:
    """Runs one seed after the other; to be used in a `with` block, in which the production code logs nothing.

    tell: where a readable trace goes, line by line. The garbage collector works between worlds only: it may run code of the dead.
    """

    def __init__(self, tell: Callable[[str], None] | None = None, make_leader: MakeLeader = make_leader) -> None:
        self._tell = tell
        self._make_leader = make_leader
        self._ear = _Ear(logging.ERROR if tell is None else logging.INFO)
        self._closing = ExitStack()
        self._num_runs = 0

    def __enter__(self) -> Self:
        self._closing.enter_context(self._ear.listening())
        self._closing.callback(gc.enable)
        self._closing.callback(gc.unfreeze)
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.close()

    def run(self, seed: int) -> Report:
        """What comes of a seed. Nothing of it remains."""
        world = World(schedule(seed), self._make_leader, self._tell)
        self._ear.world, self._ear.first = world, ""
        report = world.run()
        report.error = report.error or self._ear.first
        self._num_runs += 1
        if self._num_runs % COLLECT_EVERY == 0:
            gc.collect()
        return report


class _Ear(logging.Handler):
    """Hears errors that the production code logs because they are bugs of its own; with a trace, everything else too."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.first = ""
        self.world: World | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what is logged, instead of having it printed."""
        loggers = [logging.getLogger(name) for name in LOGGERS]
        before = [(logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.setLevel(self.level)
            logger.addHandler(self)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, (level, propagate) in zip(loggers, before, strict=True):
                logger.removeHandler(self)
                logger.setLevel(level)
                logger.propagate = propagate

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        if self.world is not None and self.level < logging.ERROR:
            self.world.note(f"log: {LineFormatter().format(record)[25:]}")
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, BatonError):
            self.first = self.first or f"logged: {record.getMessage()}: {error!r} {_where(error)}"
