"""A ward under care: whatever breaks is ended whole and built again, wishes count when they can, and everything is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.config import BatonConfig, MembershipConfig
from baton.errors import NodeLost
from cluster.care import Care
from cluster.hosts import Located
from cluster.messages import Back, Lost, News, Rebuilding, Retired, Waiting
from cluster.placement import Waits
from cluster.supervision import NodeEvent, NodeState
from router.notices import Notice

LIMIT_S = 20.0


class PaperNode:
    """A node without processes: a stage lasts until it is let through, a life until it is broken. At most one life is there at a time."""

    name = "decode-0"

    def __init__(self) -> None:
        self.lives = 0
        self.alive = False
        self.slots = True
        self.failing: dict[str, list[Exception]] = {}
        self.open = {"place": asyncio.Event(), "load": asyncio.Event()}
        for gate in self.open.values():
            gate.set()
        self.gently: list[bool] = []
        self.lacking: list[str] = []
        self._breaking: asyncio.Queue[Lost] = asyncio.Queue()

    @property
    def processes(self) -> list[Located]:
        return []

    async def place(self, waits: Waits | None = None) -> None:
        self._fail("place")
        assert waits is not None
        for why in self.lacking:
            waits(why)
        await self.open["place"].wait()
        self.slots = True

    async def start(self) -> None:
        assert not self.alive, "two lives at once"
        assert self.slots
        self.alive, self.lives = True, self.lives + 1
        self._fail("start")

    async def load(self) -> None:
        self._fail("load")
        await self.open["load"].wait()

    async def broken(self) -> tuple[Lost, ...]:
        return (await self._breaking.get(),)

    def condemned(self, address: str, why: str) -> Lost | None:
        return lost(why) if address == f"life {self.lives}" else None

    async def end(self, *, gently: bool = False) -> None:
        self.gently.append(gently)
        self._fail("end")
        self.alive = False

    def give_back(self) -> None:
        assert not self.alive, "slots of a living node"
        self.slots = False

    def breaks(self) -> None:
        self._breaking.put_nowait(lost("it was killed"))

    def _fail(self, stage: str) -> None:
        if planned := self.failing.get(stage):
            raise planned.pop(0)


def lost(why: str) -> Lost:
    return Lost(name="decode-0/0", pid=7, reason=why)


class Kept:
    """A ward in care, what was told of it, and the states it went through."""

    def __init__(self, node: PaperNode, limits: MembershipConfig) -> None:
        self.node = node
        self.news: asyncio.Queue[News] = asyncio.Queue()
        self.states: list[NodeState] = []
        config = BatonConfig(model="m", membership=limits)
        self.care = Care(node, config, self.news.put_nowait, lambda: self.states.append(self.care.state))

    async def until(self, kind: type[News]) -> News:
        while not isinstance(news := await self.next(), kind):
            continue
        return news

    async def next(self) -> News:
        async with asyncio.timeout(LIMIT_S):
            return await self.news.get()

    async def state(self, wanted: NodeState) -> None:
        async with asyncio.timeout(LIMIT_S):
            while self.care.state is not wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def wish(self, kind: str, address: str = "") -> None:
        self.care.wish(Notice(kind, "decode-0", address, "because"))  # type: ignore[arg-type]


@asynccontextmanager
async def kept(max_backoff_s: float = 0.01, *, rebuild: bool = True) -> AsyncIterator[Kept]:
    """One that has been launched and serves."""
    this = Kept(PaperNode(), MembershipConfig(max_backoff_s=max_backoff_s, rebuild=rebuild))
    this.node.slots = True
    await this.node.start()
    for event in (NodeEvent.PLACED, NodeEvent.STARTED, NodeEvent.READY):
        this.care.step(event)
    this.states.clear()
    keeping = asyncio.create_task(this.care.keep())
    try:
        yield this
    finally:
        assert not keeping.done(), "care ends only with the cluster"
        keeping.cancel()
        await asyncio.wait([keeping])


async def test_what_breaks_is_ended_and_built_again() -> None:
    async with kept() as this:
        this.node.breaks()
        assert await this.next() == lost("it was killed")
        assert await this.next() == Rebuilding(node="decode-0", why="decode-0/0: it was killed")
        back = await this.next()
        assert isinstance(back, Back) and 0 <= back.seconds < LIMIT_S
        assert (this.node.lives, this.care.lives, this.care.state) == (2, 2, NodeState.SERVING)
        assert this.node.gently == [False], "nobody waits for the rest of a broken node"
        assert this.states == ["broken", "waiting", "placing", "starting", "loading", "serving"]


@pytest.mark.parametrize("stage", ["place", "start", "load"])
@pytest.mark.parametrize("failure", [NodeLost("no luck"), ValueError("a bug")])
async def test_a_build_that_fails_is_tried_again_after_a_pause_for_as_long_as_it_takes(stage: str, failure: Exception) -> None:
    async with kept() as this:
        this.node.failing[stage] = [failure] * 5
        this.node.breaks()
        for _ in range(5):
            waiting = await this.until(Waiting)
            assert isinstance(waiting, Waiting) and waiting.seconds == 0.01 and str(failure) in waiting.why
        await this.until(Back)
        assert this.care.lives == 7


async def test_an_end_that_fails_does_not_keep_a_node_down() -> None:
    async with kept() as this:
        this.node.failing["end"] = [ValueError("a bug")]
        this.node.alive = False
        this.node.breaks()
        await this.until(Back)


async def test_a_node_that_fits_nowhere_says_so_and_waits() -> None:
    async with kept() as this:
        this.node.lacking = ["no host has 2 slots"]
        this.node.open["place"].clear()
        this.node.breaks()
        assert await this.until(Waiting) == Waiting(node="decode-0", why="no host has 2 slots")
        assert (this.care.state, this.care.why) == (NodeState.PLACING, "no host has 2 slots")
        this.node.open["place"].set()
        await this.until(Back)


async def test_a_condemned_life_is_ended_and_a_condemnation_of_another_is_not_heard() -> None:
    async with kept() as this:
        this.wish("condemn", "life 0")
        this.wish("condemn", "life 1")
        this.wish("condemn", "life 1")
        assert await this.next() == lost("because")
        await this.until(Back)
        await asyncio.sleep(0.05)
        assert (this.node.lives, this.care.state) == (2, NodeState.SERVING)


@pytest.mark.parametrize("state", [NodeState.SERVING, NodeState.PLACING, NodeState.LOADING, NodeState.WAITING])
async def test_a_node_is_retired_from_any_state_and_comes_back(state: NodeState) -> None:
    async with kept(max_backoff_s=60.0) as this:
        if state is NodeState.WAITING:
            this.node.failing["start"] = [NodeLost("no luck")] * 3
        if gate := {NodeState.PLACING: "place", NodeState.LOADING: "load"}.get(state):
            this.node.open[gate].clear()
        if state is not NodeState.SERVING:
            this.node.breaks()
            await this.state(state)
        this.wish("retire")
        await this.until(Retired)
        await this.state(NodeState.RETIRED)
        assert not this.node.alive and not this.node.slots
        assert this.node.gently[-1]
        for gate_of_any in this.node.open.values():
            gate_of_any.set()
        this.node.failing.clear()
        this.wish("retire")
        this.wish("restore")
        assert isinstance(await this.until(Rebuilding), Rebuilding)
        await this.until(Back)
        assert this.node.alive and this.node.slots


async def test_a_wish_that_comes_while_a_life_is_ended_is_not_forgotten() -> None:
    async with kept() as this:
        this.node.breaks()
        await this.until(Lost)
        this.wish("retire")
        await this.until(Retired)
        assert not this.node.alive


async def test_an_operator_need_not_wait_for_the_pause() -> None:
    async with kept(max_backoff_s=3600.0) as this:
        this.node.failing["load"] = [NodeLost("no luck")] * 12
        this.node.breaks()
        for _ in range(12):
            await this.until(Waiting)
            this.wish("restore")
        await this.until(Back)


async def test_without_rebuild_a_broken_node_stays_as_it_is_until_somebody_wants_it_back() -> None:
    async with kept(rebuild=False) as this:
        this.node.breaks()
        await this.until(Lost)
        await this.state(NodeState.BROKEN)
        this.wish("condemn", "life 1")
        await asyncio.sleep(0.05)
        assert this.care.state is NodeState.BROKEN and this.node.alive
        this.wish("restore")
        await this.until(Back)
        assert this.node.lives == 2
