"""Configuration -> placement -> actors -> loaded -> proven: a running cluster, or a typed error and nothing left.

Knows: Ray actors and the order of a launch. Does not know: which Ray it is connected to, nor who watches the progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from baton.config import BatonConfig, RankPlan
from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded
from cluster.actors import Front, Rank
from cluster.calls import STOP_S, end_actor, first_failure, reason, result
from cluster.messages import ClusterInfo, Lost, Progress, RankInfo, Stage
from cluster.placement import Placed, placed, release_all, reserve
from cluster.plan import FRONT, asks, rank_plans
from ranks.facts import RankAddress, RankCounts

log = logging.getLogger(__name__)

_PROGRESS_S = 0.25
_LAST_WORD_S = 1.0  # before ray.ready_s has passed, the router says why nothing is ready

Say = Callable[[Stage | Progress], None]


@dataclass(frozen=True, slots=True)
class RunningRank:
    """A rank's plan, its actor, and where it can be reached."""

    plan: RankPlan
    actor: ActorHandle[Any]
    address: RankAddress

    @property
    def name(self) -> str:
        """ "decode-0/1": what people call this rank."""
        return rank_name(self.plan)


class Cluster:
    """All actors and placement groups of one cluster. State owner: the loop that launched it; everything ends with `stop`.

    Detached clusters outlive this process: their actors carry names in the Ray namespace of the connection.
    """

    def __init__(self, config: BatonConfig, *, detached: bool = False, cores: int | None = None) -> None:
        self.config = config
        self.addresses: dict[str, str] = {}
        self._detached = detached
        self._cores = cores
        self._groups: list[PlacementGroup] = []
        self._actors: dict[str, ActorHandle[Any]] = {}
        self._ranks: list[RunningRank] = []
        self._pids: dict[str, int] = {}

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
        nodes = await self._place()
        enter("starting")
        await first_failure([self._start_front(), self._start_ranks(nodes)])
        enter("loading")
        await self._load(say)
        enter("connecting")
        await self._connect()
        enter("proving")
        await result(FRONT, "serve", self._actors[FRONT].wait_ready.remote(deadline.left_s()))

    async def _place(self) -> list[Placed]:
        wanted = asks(self.config)
        self._groups = [reserve(ask, detached=self._detached) for ask in wanted]
        return await asyncio.gather(*(placed(ask, group, self._cores) for ask, group in zip(wanted, self._groups, strict=True)))

    async def _start_front(self) -> None:
        # Beside whoever launched the cluster: the addresses in the configuration are meant there.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = self._create(Front, FRONT, (), {"num_cpus": 0, "scheduling_strategy": here})
        self._pids[FRONT] = await result(FRONT, "start", actor.pid.remote())
        self.addresses = await result(FRONT, "start", actor.start.remote(self.config))

    async def _start_ranks(self, nodes: Sequence[Placed]) -> None:
        group_of = {node.ask.node: node.group for node in nodes}
        plans = rank_plans(self.config, [(node.ask, node.host) for node in nodes])
        self._ranks = await first_failure([self._start_rank(plan, group_of[plan.node]) for plan in plans])

    async def _start_rank(self, plan: RankPlan, group: PlacementGroup) -> RunningRank:
        name = rank_name(plan)
        actor = self._create_rank(plan, group)
        self._pids[name] = await result(name, "start", actor.pid.remote())
        return RunningRank(plan, actor, await result(name, "start", actor.prepare.remote()))

    def _create_rank(self, plan: RankPlan, group: PlacementGroup) -> Any:
        slot = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=plan.rank)
        options = {"num_cpus": 0, "resources": group.bundle_specs[plan.rank], "scheduling_strategy": slot}
        return self._create(Rank, rank_name(plan), (plan,), options)

    def _create(self, kind: type, name: str, arguments: tuple[object, ...], options: dict[str, Any]) -> Any:
        # A rank that died has lost its KV blocks and its process groups: Ray must not restart it.
        named = {"name": name, "lifetime": "detached"} if self._detached else {}
        actor: Any = ray.remote(kind).options(max_restarts=0, max_task_retries=0, **named, **options).remote(*arguments)
        self._actors[name] = actor
        return actor

    async def _load(self, say: Say) -> None:
        loads = [result(rank.name, "load", rank.actor.load.remote(self._addresses_of(rank.plan.node))) for rank in self._ranks]
        reports = [asyncio.create_task(_report(rank, say)) for rank in self._ranks]
        try:
            await first_failure(loads)
        finally:
            for report in reports:
                report.cancel()
            await asyncio.gather(*reports, return_exceptions=True)

    def _addresses_of(self, node: str) -> list[RankAddress]:
        return [rank.address for rank in self._ranks if rank.plan.node == node]

    async def _connect(self) -> None:
        await first_failure([result(rank.name, "start", rank.actor.start.remote()) for rank in self._ranks])
        leaders = [rank for rank in self._ranks if rank.plan.tp_rank == 0]
        add: Any = self._actors[FRONT].add_group
        await first_failure([result(FRONT, "add a group", add.remote(rank.plan.role, rank.address.control)) for rank in leaders])

    def info(self) -> ClusterInfo:
        """Addresses and processes."""
        ranks = tuple(rank_info(rank.plan.role, rank.address) for rank in self._ranks)
        return ClusterInfo(model=self.config.name, router_pid=self._pids[FRONT], ranks=ranks, **self.addresses)

    def pid_of(self, name: str) -> int | None:
        """The process of a rank or the router, once it runs."""
        return self._pids.get(name)

    async def status(self) -> dict[str, object]:
        """What the router says: groups, pairs, requests."""
        answer: dict[str, object] = await result(FRONT, "report", self._actors[FRONT].status.remote())
        return answer

    async def counts(self) -> list[RankCounts]:
        """What every rank holds, in rank order. Raises NodeLost if one is dead."""
        return await first_failure([result(rank.name, "count", rank.actor.counts.remote()) for rank in self._ranks])

    async def watch(self, lost: Callable[[Lost], None]) -> None:
        """Call `lost` for each process that ends without `stop`, and have the router use its node no more; until cancelled or all ended."""
        await asyncio.gather(*(self._watch_one(name, actor, lost) for name, actor in self._actors.items()))

    async def _watch_one(self, name: str, actor: ActorHandle[Any], lost: Callable[[Lost], None]) -> None:
        try:
            await actor.serving.remote()
        except (RayActorError, RayTaskError) as error:
            lost(Lost(name=name, pid=self.pid_of(name) or 0, reason=reason(error)))
            await self._use_no_more({rank.plan.node for rank in self._ranks if rank.name == name})

    async def _use_no_more(self, nodes: Set[str]) -> None:
        """Have the router forget nodes that lost a rank: a leader that still answers looks well, and cannot step without it.

        Should the router not do it in time, it finds out by itself, when the node's next step fails.
        """
        front: Any = self._actors.get(FRONT)
        leaders = [rank.address.control for rank in self._ranks if rank.plan.node in nodes and rank.plan.tp_rank == 0]
        if front is None or not leaders:
            return
        try:
            async with asyncio.timeout(STOP_S):
                await first_failure([result(FRONT, "remove a group", front.remove_group.remote(address)) for address in leaders])
        except (BatonError, TimeoutError) as error:
            log.warning("the router did not take %s out of use: %r", ", ".join(sorted(nodes)), error)

    async def stop(self) -> None:
        """Stop the router, then all ranks, then remove what Ray holds. Takes at most about 2 x STOP_S; safe to call twice."""
        actors, self._actors = self._actors, {}
        groups, self._groups = self._groups, []
        front = actors.pop(FRONT, None)
        if front is not None:
            await end_actor(front)
        await asyncio.gather(*(end_actor(actor) for actor in actors.values()))
        release_all(groups)


async def launch(config: BatonConfig, say: Say, *, detached: bool = False, cores: int | None = None) -> Cluster:
    """A running cluster on the Ray this process is connected to. On any failure, Ctrl-C included, everything is taken down again."""
    cluster = Cluster(config, detached=detached, cores=cores)
    try:
        await cluster.up(say)
    except BaseException:
        await cluster.stop()
        raise
    return cluster


async def _report(rank: RunningRank, say: Say) -> None:
    """Say how far a rank is until cancelled; its death is for whoever waits for the load to tell."""
    with contextlib.suppress(RayActorError):
        while True:
            now = await rank.actor.progress.remote()
            say(Progress(node=rank.plan.node, rank=rank.plan.rank, stage=now.stage, done_bytes=now.done_bytes, total_bytes=now.total_bytes))
            await asyncio.sleep(_PROGRESS_S)


def rank_name(plan: RankPlan) -> str:
    """ "decode-0/1"."""
    return f"{plan.node}/{plan.rank}"


def rank_info(role: Any, address: RankAddress) -> RankInfo:
    """A rank's address as it is told to people."""
    return RankInfo(role=role, node=address.node, rank=address.rank, pid=address.pid, host=address.host, address=address.control)
