"""Taking over the actors of a detached cluster whose supervisor died: what is whole goes on serving, what is not is built again.

Knows the names of a cluster's actors and what these say of themselves. Decides nothing that care.py would not decide as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group_table

from cluster import census
from cluster.actors import FrontSelf, RankSelf
from cluster.care import Care
from cluster.door import Door
from cluster.hosts import ANSWER_S, Located
from cluster.launch import Cluster
from cluster.node import Node, RunningRank
from cluster.placement import Placed, find_placed, release_all
from cluster.plan import FRONT
from cluster.supervision import NodeEvent
from router.membership import NodeReport

log = logging.getLogger(__name__)

_SERVES = (NodeEvent.PLACED, NodeEvent.STARTED, NodeEvent.READY)
_RETIRED = (NodeEvent.RETIRE, NodeEvent.ENDED)
_WHY = "was not whole when its supervisor was started again"


async def adopt(cluster: Cluster) -> None:
    """Bring a new Cluster into the state of what runs under its names. `keep` comes next, and builds what is missing."""
    door = census.actor(FRONT)
    front: FrontSelf | None = await _answer(door.describe.remote()) if door else None
    reports = await _reports(door) if door and front and front.addresses else {}
    await asyncio.gather(*(_adopt_node(node, cluster, reports.get(node.name)) for node in cluster.nodes))
    lives = {address: cluster.cares[node.name].lives for node in cluster.nodes for address in node.leaders}
    await _adopt_door(cluster.door, cluster.cares[FRONT], door, front, lives)


async def _adopt_node(node: Node, cluster: Cluster, report: NodeReport | None) -> None:
    """report: what the router knew of the node, if it was there to ask."""
    care = cluster.cares[node.name]
    care.lives, care.why = (report.lives, report.why) if report else (care.lives, care.why)
    actors = {name: found for name in _rank_names(node) if (found := census.actor(name)) is not None}
    selves = {name: said for name, said in zip(actors, await asyncio.gather(*map(_describe, actors.values())), strict=True) if said}
    at = _placed(node, cluster.cores)
    if report and report.stage == "retired" and not actors:
        node.adopt(at, {}, {}, [])
        node.give_back()
        _step(care, _RETIRED)
        return
    ranks = [rank for name in actors if (rank := _running(actors[name], selves.get(name))) is not None]
    known = {name: said.process for name, said in selves.items()} | await _silent(set(actors) - set(selves))
    whole = at is not None and len(ranks) == node.ask.num_ranks
    node.adopt(at, actors, known, ranks if whole else [])
    if not whole:
        care.why = f"{node.name} {_WHY}"
    _step(care, _SERVES if whole else (NodeEvent.BROKE,))


async def _adopt_door(door: Door, care: Care, actor: ActorHandle[Any] | None, front: FrontSelf | None, lives: dict[str, int]) -> None:
    """lives: of the nodes that were taken over, by the addresses of their leaders. Groups of other lives are forgotten by the router."""
    if actor is not None:
        process = front.process if front else next(iter(await census.processes([FRONT])), None)
        groups = {(address, lives.get(address, 0)): role for role, address in front.groups} if front else {}
        door.adopt(actor, process, front.addresses if front else {}, groups)
    serves = front is not None and bool(front.addresses)
    if not serves:
        care.why = f"the router {_WHY}"
    _step(care, _SERVES if serves else (NodeEvent.BROKE,))


def _step(care: Care, events: Iterable[NodeEvent]) -> None:
    for event in events:
        care.step(event)


def _rank_names(node: Node) -> list[str]:
    return [f"{node.name}/{rank}" for rank in range(node.ask.num_ranks)]


def _placed(node: Node, cores: int | None) -> Placed | None:
    """The node's slots, if they are there; a group that is still waited for, or whose host is gone, is given up."""
    group = census.group(node.name)
    if group is None:
        return None
    if placement_group_table(group)["state"] == "CREATED":
        return find_placed(node.ask, group, cores)
    release_all([group])
    return None


def _running(actor: ActorHandle[Any], said: RankSelf | None) -> RunningRank | None:
    if said is None or said.address is None or not said.serving:
        return None
    return RunningRank(said.plan, actor, said.process, said.address)


async def _silent(names: Iterable[str]) -> dict[str, Located]:
    """The processes of actors that do not answer."""
    known = {name: await census.processes([name]) for name in names}
    return {name: found[0] for name, found in known.items() if found}


async def _describe(actor: ActorHandle[Any]) -> RankSelf | None:
    said: RankSelf | None = await _answer(actor.describe.remote())
    return said


async def _reports(door: ActorHandle[Any]) -> dict[str, NodeReport]:
    status: dict[str, Any] = await _answer(door.status.remote()) or {}
    return {facts["node"]: NodeReport(**facts) for facts in status.get("nodes", [])}


async def _answer(reference: Any) -> Any:
    """What an actor says; None if it is dead, or says nothing in time."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await reference
    except (RayActorError, RayTaskError, TimeoutError) as error:
        log.warning("an actor could not be asked: %s", type(error).__name__)
        return None
