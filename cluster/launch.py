"""Configuration -> placement -> actors -> loaded -> proven: a running cluster, or a typed error and nothing left; then it is kept whole.

Knows the order of a launch, and who is cared for afterwards. Does not know: which Ray it is connected to, nor who watches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import cast

from baton.config import BatonConfig, RankPlan
from baton.deadline import Deadline
from baton.errors import DeadlineExceeded
from cluster.calls import first_failure
from cluster.care import Care, Tell, Ward
from cluster.door import Door
from cluster.hosts import Located, living_everywhere, own_host_id
from cluster.messages import ClusterInfo, News, Progress, Stage
from cluster.node import Node
from cluster.plan import FRONT, asks, rank_plans
from cluster.supervision import NODE_LIFE, NodeEvent, NodeState
from ranks.facts import RankCounts
from router.membership import NodeReport
from router.membership import Stage as Reported
from router.notices import Notice

log = logging.getLogger(__name__)

_LAST_WORD_S = 1.0  # before ray.ready_s has passed, the router says why nothing is ready

Say = Callable[[Stage | Progress], None]


class Cluster:
    """All processes and slots of one cluster. State owner: the loop that made it; everything ends with `stop`.

    Detached clusters outlive this process: their actors carry names in the Ray namespace of the connection.
    host_id: Ray's id of the host the router belongs on, where the addresses in the configuration are meant; default: this one.
    """

    def __init__(self, config: BatonConfig, *, detached: bool = False, cores: int | None = None, host_id: str = "") -> None:
        self.config = config
        self.detached = detached
        self.cores = cores
        self.door = Door(
            config,
            host_id or own_host_id(),
            detached=detached,
            silence_s=2 * config.membership.dead_s,
            on_notice=self._on_notice,
        )
        self.nodes = [Node(ask, partial(self._plans, ask.node), detached=detached, cores=cores) for ask in asks(config)]
        self.cares = {ward.name: Care(ward, config, self._tell, self._show) for ward in self._wards}
        self._tell_whom: Tell = _log
        self._stepped = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def up(self, say: Say) -> None:
        """Bring everything up, or raise a BatonError; the caller then calls `stop`.

        ResourceExhausted(cause="no_machine"): no host for a node. ConfigError, InternalError …(stage="load", node=the rank):
        a rank could not load. DeadlineExceeded: not ready within ray.ready_s.
        """
        stage = "placing"

        def enter(name: str) -> None:
            nonlocal stage
            stage = name
            say(Stage(stage=name))

        try:
            async with asyncio.timeout(self.config.ray.ready_s):
                await self._up(enter, say, Deadline.after(self.config.ray.ready_s - _LAST_WORD_S))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the cluster was not ready after {self.config.ray.ready_s:g} s (ray.ready_s); it was still {stage}", stage=stage
            ) from error

    async def _up(self, enter: Callable[[str], None], say: Say, deadline: Deadline) -> None:
        enter("placing")
        await self._all(self._wards, lambda ward: ward.place(), NodeEvent.PLACED)
        enter("starting")
        await first_failure([self._open_door(), self._all(self.nodes, lambda node: node.start(), NodeEvent.STARTED)])
        enter("loading")
        for node in self.nodes:
            node.follow(say)
        await self._all(self.nodes, lambda node: node.load(), NodeEvent.READY)
        enter("connecting")
        await self.door.settle()
        enter("proving")
        await self.door.wait_ready(deadline.left_s())
        for node in self.nodes:
            node.follow(None)

    async def _all(self, wards: Sequence[Ward], work: Callable[[Ward], Awaitable[None]], event: NodeEvent) -> None:
        """One stage of them all at once; none is through before all are."""
        await first_failure([work(ward) for ward in wards])
        for ward in wards:
            self.cares[ward.name].step(event)

    async def _open_door(self) -> None:
        await self.door.start()
        self.cares[FRONT].step(NodeEvent.STARTED)
        await self.door.load()
        self.cares[FRONT].step(NodeEvent.READY)

    def _plans(self, node: str) -> list[RankPlan]:
        """The plans of a node's ranks, on the hosts that all nodes have now, or had last."""
        known = [(item.ask, item.placed.host) for item in self.nodes if item.placed is not None]
        return [plan for plan in rank_plans(self.config, known) if plan.node == node]

    def keep(self, tell: Tell) -> asyncio.Task[None]:
        """Keep what is up, and build again what breaks, telling what happens: until `wind_down` or `stop`. Only a bug ends it earlier."""
        self._tell_whom = tell
        self._keeping = asyncio.create_task(self._keep_all(), name="keeping")
        return self._keeping

    async def _keep_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for care in self.cares.values():
                group.create_task(care.keep(), name=f"care of {care.ward.name}")

    async def whole(self) -> None:
        """Return once the router and every node serve that are not retired. The caller has a deadline, or all the time in the world."""
        while any(care.state not in (NodeState.SERVING, NodeState.RETIRED) for care in self.cares.values()):
            self._stepped.clear()
            await self._stepped.wait()

    async def _let_go(self) -> None:
        """Nothing is built again from here on."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])

    @property
    def _wards(self) -> list[Door | Node]:
        return [self.door, *self.nodes]

    def processes(self) -> ClusterInfo:
        """Addresses, and the processes of this moment: they change when nodes are built again."""
        ranks = tuple(rank.info() for node in self.nodes for rank in node.ranks)
        return ClusterInfo(model=self.config.name, router_pid=self.door.pid, ranks=ranks, **self.door.addresses)

    def located(self) -> list[Located]:
        """Every process that may be alive, of earlier lives as well."""
        return [process for ward in self._wards for process in ward.processes]

    def pid_of(self, name: str) -> int | None:
        """The process of a rank or the router, once it runs."""
        pids = (ward.pid_of(name) for ward in self._wards)
        return next((pid for pid in pids if pid is not None), None)

    def reports(self) -> list[NodeReport]:
        """How every node is."""
        return [_report(node, self.cares[node.name]) for node in self.nodes]

    async def status(self) -> dict[str, object]:
        """What the router says: groups, pairs, nodes, requests."""
        return await self.door.status()

    async def counts(self) -> list[RankCounts]:
        """What every living rank holds, in rank order."""
        return [counts for node in await asyncio.gather(*(node.counts() for node in self.nodes)) for counts in node]

    async def wind_down(self) -> None:
        """Take no more requests and return once those that run are over, or have had router.drain_s seconds. `stop` comes next."""
        await self._let_go()
        await self.door.wind_down(self.config.router.drain_s)

    async def stop(self) -> list[Located]:
        """Stop the router, then all ranks, for certain, and remove what Ray holds; the processes that are left nevertheless: none.

        Takes at most about 2 x STOP_S, and more only for hosts that do not answer. Safe to call twice.
        """
        await self._let_go()
        await self.door.end(gently=True)
        await asyncio.gather(*(node.end(gently=True) for node in self.nodes))
        for care in self.cares.values():
            care.ward.give_back()
            if not NODE_LIFE.ends(care.state):
                care.step(NodeEvent.DOWN)
        return await living_everywhere(self.located())

    def _show(self) -> None:
        """Have the router know which groups serve, and how every node is."""
        groups = {
            (address, self.cares[node.name].lives): role
            for node in self.nodes
            if self.cares[node.name].state is NodeState.SERVING
            for address, role in node.leaders.items()
        }
        self.door.show(groups, {report.node: report for report in self.reports()})
        self._stepped.set()

    def _tell(self, news: News) -> None:
        self._tell_whom(news)

    def _on_notice(self, notice: Notice) -> None:
        for care in self._meant(notice):
            care.wish(notice)

    def _meant(self, notice: Notice) -> Iterator[Care]:
        """The node that is named, or that the leader at that address belongs to: one that never said its name is called by its address."""
        for node in self.nodes:
            if notice.node == node.name or notice.address in node.leaders:
                yield self.cares[node.name]


async def launch(config: BatonConfig, say: Say, *, detached: bool = False, cores: int | None = None, host_id: str = "") -> Cluster:
    """A running cluster on the Ray this process is connected to. On any failure, Ctrl-C included, everything is taken down again."""
    cluster = Cluster(config, detached=detached, cores=cores, host_id=host_id)
    try:
        await cluster.up(say)
    except BaseException:
        await cluster.stop()
        raise
    return cluster


def _report(node: Node, care: Care) -> NodeReport:
    stage = "retired" if care.state is NodeState.GONE else care.state.value
    return NodeReport(node.name, node.ask.role, cast(Reported, stage), care.why, care.lives)


def _log(news: News) -> None:
    log.info("%s", news.said())
