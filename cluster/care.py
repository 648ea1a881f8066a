"""Keeping one thing alive that can be built anew: a node, or the router. Carries out what each state of NODE_LIFE asks for.

Knows states, pauses and wishes. Does not know: Ray, ranks, or what a router is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from baton.config import BatonConfig
from baton.deadline import now_s
from baton.errors import BatonError
from cluster.hosts import Located
from cluster.messages import Back, Lost, News, Rebuilding, Retired, Waiting
from cluster.placement import Waits
from cluster.supervision import NODE_LIFE, Backoff, NodeEvent, NodeState
from router.notices import Notice

log = logging.getLogger(__name__)

_S, _E = NodeState, NodeEvent

Tell = Callable[[News], None]


class Ward(Protocol):
    """What is kept alive, one life at a time. A BatonError out of `place`, `start` or `load` ends the life."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def processes(self) -> list[Located]:
        """All that may be alive of it."""

    async def place(self, waits: Waits | None = None) -> None:
        """Find its host. waits: told what is lacking, while this waits for it."""

    async def start(self) -> None:
        """Start its processes."""

    async def load(self) -> None:
        """Have them serve."""

    async def broken(self) -> tuple[Lost, ...]:
        """Return once it does not serve any more."""

    def condemned(self, address: str, why: str) -> Lost | None:
        """Whom a condemnation of what listens on `address` means; None if that is nothing of this life."""

    async def end(self, *, gently: bool = False) -> None:
        """End every process for certain."""

    def give_back(self) -> None:
        """Release its slots."""


class Care:
    """One ward's states. State owner: the cluster's loop; every change goes through `step`. Ends when whoever runs `keep` cancels it.

    why: of the last break, "" before. lives: how often it was built, this time included. show: called after every step.
    """

    def __init__(self, ward: Ward, config: BatonConfig, tell: Tell, show: Callable[[], None]) -> None:
        self.ward = ward
        self.state = NODE_LIFE.start
        self.why = ""
        self.lives = 1
        self._limits = config.membership
        self._ready_s = config.ray.ready_s
        self._tell = tell
        self._show = show
        self._backoff = Backoff()
        self._wishes: deque[Notice] = deque()
        self._wished = asyncio.Event()
        self._serving_since_s = 0.0
        self._away_since_s = now_s()

    def step(self, event: NodeEvent) -> None:
        """Every change of state goes through here. Raises InternalError for one that cannot be."""
        before, self.state = self.state, NODE_LIFE.after(self.state, event)
        if event is _E.READY:
            self._serving_since_s = now_s()
        elif event is _E.BROKE:
            served_s = now_s() - self._serving_since_s if before is _S.SERVING else 0.0
            self._backoff = self._backoff.broke(served_s)
            if before is _S.SERVING:
                self._away_since_s = now_s()
        self._show()

    def wish(self, notice: Notice) -> None:
        """The router wants something of it. Taken up in order, once nothing is being killed."""
        self._wishes.append(notice)
        self._wished.set()

    async def keep(self) -> None:
        """Serve, and be built again as often as it breaks, for good."""
        while not NODE_LIFE.ends(self.state):
            event = await self._next()
            self.step(event)
            if event is _E.READY:
                self._tell(Back(node=self.ward.name, seconds=now_s() - self._away_since_s))

    async def _next(self) -> NodeEvent:
        match self.state:
            case NodeState.SERVING:
                return await self._unless_wished(self._serve())
            case NodeState.BROKEN:
                return await self._clear_away()
            case NodeState.WAITING:
                return await self._unless_wished(self._pause())
            case NodeState.RETIRING:
                return await self._retire()
            case NodeState.RETIRED:
                return await self._unless_wished(_forever())
            case _:
                return await self._unless_wished(self._build())

    async def _unless_wished(self, doing: Coroutine[Any, Any, NodeEvent]) -> NodeEvent:
        """What happens first: what comes of `doing`, or a wish that counts now."""
        work = asyncio.create_task(doing)
        try:
            while not work.done():
                if (event := self._granted()) is not None:
                    return event
                await self._wished_or(work)
            return work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _wished_or(self, work: asyncio.Task[NodeEvent]) -> None:
        self._wished.clear()
        wished = asyncio.create_task(self._wished.wait())
        try:
            await asyncio.wait({work, wished}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wished.cancel()

    def _granted(self) -> NodeEvent | None:
        """What the wishes that wait come to now; None: nothing. Those that have no meaning now are dropped."""
        while self._wishes:
            if (event := self._meaning(self._wishes.popleft())) is not None:
                return event
        return None

    def _meaning(self, notice: Notice) -> NodeEvent | None:
        if notice.kind == "condemn":
            return self._condemned(notice) if self.state is _S.SERVING else None
        if notice.kind == "retire":
            return self._retired(notice) if NODE_LIFE.allows(self.state, _E.RETIRE) else None
        again = {_S.RETIRED: _E.RESTORE, _S.WAITING: _E.DUE}.get(self.state)
        if again is not None:
            self._announce("an operator wants it back")
        return again

    def _condemned(self, notice: Notice) -> NodeEvent | None:
        lost = self.ward.condemned(notice.address, notice.why)
        return self._break((lost,)) if lost else None

    def _retired(self, notice: Notice) -> NodeEvent:
        self.why = notice.why
        return _E.RETIRE

    def _break(self, lost: Sequence[Lost]) -> NodeEvent:
        for item in lost:
            self._tell(item)
        self.why = f"{lost[0].name}: {lost[0].reason}" if lost[0].ended else lost[0].reason  # the router names whom it condemns
        return _E.BROKE

    async def _serve(self) -> NodeEvent:
        try:
            return self._break(await self.ward.broken())
        except BatonError as error:
            self.why = error.message
        except Exception as error:  # the supervisor's edge: what cannot be watched is not kept, so it is built again
            log.exception("%s could not be watched", self.ward.name)
            self.why = f"{type(error).__name__}: {error}"
        return _E.BROKE

    async def _clear_away(self) -> NodeEvent:
        """Not one process of the broken life is left after this. Without `membership.rebuild` the node stays as it is, out of use."""
        while not self._limits.rebuild and (await self._next_wish()).kind != "restore":
            continue
        await self._ended(gently=False)
        return _E.ENDED

    async def _next_wish(self) -> Notice:
        while not self._wishes:
            self._wished.clear()
            await self._wished.wait()
        return self._wishes.popleft()

    async def _ended(self, *, gently: bool) -> None:
        try:
            await self.ward.end(gently=gently)
        except Exception:  # the supervisor's edge: whatever failed, the node must not stay down for it
            log.exception("%s could not be ended in an orderly way", self.ward.name)

    async def _pause(self) -> NodeEvent:
        pause_s = self._backoff.pause_s(self._limits.max_backoff_s)
        if pause_s:
            self._tell(Waiting(node=self.ward.name, why=self.why, seconds=pause_s))
            await asyncio.sleep(pause_s)
        self._announce(self.why)
        return _E.DUE

    def _announce(self, why: str) -> None:
        """The next life begins."""
        self.lives += 1
        if self.state is _S.RETIRED:
            self._away_since_s = now_s()
        self._tell(Rebuilding(node=self.ward.name, why=why))

    async def _build(self) -> NodeEvent:
        """The next stage of the life that is being built."""
        match self.state:
            case NodeState.PLACING:  # the only stage without a limit: see placement
                return await self._done(self.ward.place(self._lacks), _E.PLACED)
            case NodeState.STARTING:
                return await self._done(self._soon(self.ward.start()), _E.STARTED)
            case _:
                return await self._done(self._soon(self.ward.load()), _E.READY)

    def _lacks(self, why: str) -> None:
        self.why = why
        self._tell(Waiting(node=self.ward.name, why=why))
        self._show()

    async def _soon(self, work: Awaitable[None]) -> None:
        async with asyncio.timeout(self._ready_s):
            await work

    async def _done(self, work: Awaitable[None], event: NodeEvent) -> NodeEvent:
        try:
            await work
        except TimeoutError:
            self.why = f"still {self.state} after {self._ready_s:g} s (ray.ready_s)"
        except BatonError as error:
            self.why = error.message
        except Exception as error:  # the supervisor's edge: a bug in one life is no reason not to try another
            log.exception("%s could not be built", self.ward.name)
            self.why = f"{type(error).__name__}: {error}"
        else:
            return event
        return _E.BROKE

    async def _retire(self) -> NodeEvent:
        num_processes = len(self.ward.processes)
        await self._ended(gently=True)
        self.ward.give_back()
        self._tell(Retired(node=self.ward.name, num_processes=num_processes))
        return _E.ENDED


async def _forever() -> NodeEvent:
    """No deadline: a retired node comes back when an operator wants it, or never. Cancelled with the care."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")
