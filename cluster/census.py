"""Who is there of a detached cluster, by what Ray itself says: named actors, their processes, placement groups.

Everything is asked of Ray's own tables, so it is known of actors that answer nothing as well. Knows: Ray's names and tables.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import ray
from ray._private.state import actors as actor_table  # the only call that knows the process of an actor without a dashboard
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group_table

from baton.errors import NodeLost
from cluster.hosts import ANSWER_S, Located, on_host, own_host_id
from cluster.processes import ProcessMark, marks_of

PREFIX = "baton-"


def clusters() -> list[str]:
    """The names of all clusters on this Ray cluster."""
    return sorted({actor["namespace"].removeprefix(PREFIX) for actor in _named() if actor["namespace"].startswith(PREFIX)})


def actor_names(cluster: str) -> list[str]:
    """Live named actors of one cluster."""
    return sorted(actor["name"] for actor in _named() if actor["namespace"] == PREFIX + cluster)


def actor(name: str) -> ActorHandle[Any] | None:
    """The live actor of this name in the namespace of the connection."""
    with contextlib.suppress(ValueError):
        found: ActorHandle[Any] = ray.get_actor(name)
        return found
    return None


def group(name: str) -> PlacementGroup | None:
    """The placement group of this name in the namespace of the connection, ready or not."""
    with contextlib.suppress(ValueError):
        found: PlacementGroup = get_placement_group(name)
        return found
    return None


def groups() -> list[PlacementGroup]:
    """Placement groups of the namespace of the connection: also those whose actors never came to be."""
    entries = [entry for entry in placement_group_table().values() if entry["state"] != "REMOVED" and entry["name"]]
    return [found for entry in entries if (found := group(entry["name"])) is not None]


async def processes(names: Iterable[str]) -> list[Located]:
    """The processes of these actors, whether they answer or not; without those whose host does not say which process has that pid."""
    by_host: dict[str, list[int]] = {}
    for name in names:
        if (handle := actor(name)) is not None:
            known = actor_table(handle._ray_actor_id.hex())
            if known.get("Pid"):
                by_host.setdefault(known["Address"]["NodeID"], []).append(known["Pid"])
    found = await asyncio.gather(*(_marks(host_id, pids) for host_id, pids in by_host.items()))
    return [Located(mark, host_id) for host_id, marks in zip(by_host, found, strict=True) for mark in marks]


async def _marks(host_id: str, pids: list[int]) -> list[ProcessMark]:
    if host_id == own_host_id():
        return marks_of(pids)
    try:
        return await on_host(host_id, marks_of, pids, within_s=ANSWER_S)
    except NodeLost:
        return []  # a host that is gone took them along; one that does not answer is seen by its actors, which cannot be ended


def _named() -> list[dict[str, str]]:
    listed: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return listed
