"""One node: its slots on a host and its rank processes, brought up and ended as a unit.

Knows Ray actors and what ranks are asked to do. Does not know: when to build a node again (cluster/care.py), or the router.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from baton.config import RankPlan
from baton.errors import NodeLost
from cluster.actors import Rank
from cluster.calls import create_actor, end_actor, end_of, first_failure, result
from cluster.hosts import Located, answers, kill_everywhere
from cluster.messages import Lost, Progress, RankInfo
from cluster.placement import Placed, Waits, placed, release_all, reserve
from cluster.plan import NodeAsk
from ranks.facts import LoadProgress, RankAddress, RankCounts

log = logging.getLogger(__name__)

_PROGRESS_S = 0.25
_COUNT_S = 3.0

Plans = Callable[[], Sequence[RankPlan]]
Follow = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class RunningRank:
    """A rank's plan, its actor, its process, and where it can be reached."""

    plan: RankPlan
    actor: ActorHandle[Any]
    process: Located
    address: RankAddress

    @property
    def name(self) -> str:
        """ "decode-0/1": what people call this rank."""
        return rank_name(self.plan)

    def info(self) -> RankInfo:
        """As it is told to people."""
        address = self.address
        return RankInfo(
            role=self.plan.role, node=address.node, rank=address.rank, pid=address.pid, host=address.host, address=address.control
        )

    def lost(self, why: str, *, ended: bool = True) -> Lost:
        """The news of its end."""
        return Lost(name=self.name, pid=self.address.pid, reason=why, ended=ended)


class Node:
    """A `Ward` (see care.py). State owner: the loop of the cluster it is part of.

    placed: its slots, kept over its lives while their host answers. ranks: those up to their ports, in order.
    strays: processes of earlier lives that nobody could prove to be gone, because their host did not answer.
    """

    def __init__(self, ask: NodeAsk, plans: Plans, *, detached: bool, cores: int | None) -> None:
        self.ask = ask
        self.placed: Placed | None = None
        self.ranks: list[RunningRank] = []
        self.strays: list[Located] = []
        self._plans = plans
        self._detached = detached
        self._cores = cores
        self._actors: dict[str, ActorHandle[Any]] = {}
        self._processes: dict[str, Located] = {}
        self._follow: Follow | None = None

    @property
    def name(self) -> str:
        """ "decode-0"."""
        return self.ask.node

    @property
    def leaders(self) -> dict[str, str]:
        """Address and role of each group's leader."""
        return {rank.address.control: rank.plan.role for rank in self.ranks if rank.plan.tp_rank == 0}

    @property
    def processes(self) -> list[Located]:
        """All that may be alive of this node."""
        return [*self._processes.values(), *self.strays]

    def pid_of(self, name: str) -> int | None:
        """The process of a rank, once it runs; of its last life, when it does no more."""
        return self._processes[name].mark.pid if name in self._processes else None

    def follow(self, follow: Follow | None) -> None:
        """Tell how far ranks have loaded, or (None) no more."""
        self._follow = follow

    async def place(self, waits: Waits | None = None) -> None:
        """Slots on one host: those it has, while their host answers; else new ones. waits: see placement.placed."""
        if self.placed is not None and await answers(self.placed.host_id):
            return
        self.give_back()
        group = reserve(self.ask, detached=self._detached)
        try:
            self.placed = await placed(self.ask, group, self._cores, waits)
        except BaseException:
            release_all([group])
            raise

    async def start(self) -> None:
        """A process for every rank, up to its ports."""
        self._processes.clear()
        self.ranks = await first_failure([self._start_rank(plan) for plan in self._plans()])

    async def load(self) -> None:
        """Weights and KV pools on every rank, then let them serve. Raises what the rank at fault failed with."""
        addresses = [rank.address for rank in self.ranks]
        await first_failure([self._attended(rank.plan, rank.actor, "load", rank.actor.load.remote(addresses)) for rank in self.ranks])
        await first_failure([self._attended(rank.plan, rank.actor, "start", rank.actor.start.remote()) for rank in self.ranks])

    async def broken(self) -> tuple[Lost, ...]:
        """Those of its ranks that ended or failed by themselves, as soon as there is one; their processes are on their way out."""
        watching = {asyncio.create_task(end_of(rank.actor)): rank for rank in self.ranks}
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                ray.kill(watching[task].actor, no_restart=True)
            return tuple(rank.lost(task.result()) for task, rank in watching.items() if task in done)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    def condemned(self, address: str, why: str) -> Lost | None:
        """The leader that listens on `address`, if it is one of this life."""
        meant = (rank for rank in self.ranks if rank.plan.tp_rank == 0 and rank.address.control == address)
        return next((rank.lost(why, ended=False) for rank in meant), None)

    async def end(self, *, gently: bool = False) -> None:
        """Kill every rank, and return when no process is left, or none that can be reached. gently: ask them to end before."""
        actors, self._actors = self._actors, {}
        self.ranks = []
        if gently:
            await asyncio.gather(*(end_actor(actor) for actor in actors.values()))
        for actor in actors.values():
            ray.kill(actor, no_restart=True)
        left = await kill_everywhere(self.processes)
        self.strays = left
        if left:  # what may still hold the slots, or the host's attention
            log.warning("%s: not known to have ended: %s", self.name, ", ".join(str(item.mark.pid) for item in left))
            self.give_back()

    def give_back(self) -> None:
        """Release the slots."""
        held, self.placed = self.placed, None
        if held is not None:
            release_all([held.group])

    def adopt(
        self, at: Placed | None, actors: dict[str, ActorHandle[Any]], processes: dict[str, Located], ranks: list[RunningRank]
    ) -> None:
        """Take over what an earlier supervisor has left: its slots, all of its actors and processes, and the ranks that serve."""
        self.placed, self._actors, self._processes, self.ranks = at, actors, processes, ranks

    async def counts(self) -> list[RankCounts]:
        """What its ranks hold; without those that do not say within _COUNT_S, because they are dead or stopped."""
        return [item for item in await asyncio.gather(*(_count(rank) for rank in self.ranks)) if item is not None]

    async def _start_rank(self, plan: RankPlan) -> RunningRank:
        name = rank_name(plan)
        actor = self._create(plan)
        self._processes[name] = process = await result(name, "start", actor.process.remote())
        return RunningRank(plan, actor, process, await self._attended(plan, actor, "start", actor.prepare.remote()))

    def _create(self, plan: RankPlan) -> ActorHandle[Any]:
        assert self.placed is not None, "place() comes first"
        group = self.placed.group
        slot = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=plan.rank)
        options = {"num_cpus": 0, "resources": group.bundle_specs[plan.rank], "scheduling_strategy": slot}
        actor = self._actors[rank_name(plan)] = create_actor(Rank, rank_name(plan), (plan,), options, detached=self._detached)
        return actor

    async def _attended(self, plan: RankPlan, actor: ActorHandle[Any], what: str, reference: Any) -> Any:
        """The result of a call that may take long, as `calls.result`. NodeLost if the rank does not answer at all for a while."""
        calling = asyncio.create_task(result(rank_name(plan), what, reference))
        attending = asyncio.create_task(self._attend(plan, actor, what))
        try:
            await asyncio.wait({calling, attending}, return_when=asyncio.FIRST_COMPLETED)
            if attending.done():
                attending.result()
            return await calling
        finally:
            for task in (calling, attending):
                task.cancel()
            await asyncio.gather(calling, attending, return_exceptions=True)

    async def _attend(self, plan: RankPlan, actor: ActorHandle[Any], what: str) -> None:
        """Tell how far a rank is, until cancelled. The router cannot judge it yet: here, `membership.stall_s` of silence is death."""
        name, stall_s = rank_name(plan), plan.config.membership.stall_s
        while True:
            try:
                async with asyncio.timeout(stall_s):
                    now: LoadProgress = await actor.progress.remote()
            except TimeoutError as error:
                raise NodeLost(f"{name} has said nothing for {stall_s:g} s when it should {what}", stage=what, node=name) from error
            except RayActorError:
                return  # its death is for whoever waits for the call to tell
            if self._follow:
                done, total = now.done_bytes, now.total_bytes
                self._follow(Progress(node=self.name, rank=plan.rank, stage=now.stage, done_bytes=done, total_bytes=total))
            await asyncio.sleep(_PROGRESS_S)


async def _count(rank: RunningRank) -> RankCounts | None:
    try:
        async with asyncio.timeout(_COUNT_S):
            counts: RankCounts = await rank.actor.counts.remote()
            return counts
    except (RayError, TimeoutError):
        return None


def rank_name(plan: RankPlan) -> str:
    """ "decode-0/1"."""
    return f"{plan.node}/{plan.rank}"
