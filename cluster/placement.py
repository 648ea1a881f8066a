"""Nodes onto hosts: one strictly packed Ray placement group per node.

Knows: Ray's placement groups and resources. Does not know: what will run there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from ray._private.state import available_resources_per_node  # the only call that says what is free on which host
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from baton.deadline import Deadline
from baton.errors import ResourceExhausted
from cluster.plan import RANK_RESOURCE, Host, NodeAsk, can_ever_fit, explain_shortage

PLACE_S = 30.0
# In a thread, since Ray's call blocks, and in slices, so that whoever ends the wait is not kept for long.
_SLICE_S = 1.0
_MIND_S = 2.0

Waits = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Placed:
    """A node's slots, reserved on one host until `release_all`; dies with the job that asked, unless detached. host_id: Ray's."""

    ask: NodeAsk
    host: Host
    host_id: str
    group: PlacementGroup


def reserve(ask: NodeAsk, *, detached: bool) -> PlacementGroup:
    """Ask Ray for a node's slots; they are not there yet. The caller removes the group."""
    selectors = ask.label_selectors() if ask.labels else None
    lifetime = "detached" if detached else None
    group: PlacementGroup = placement_group(
        ask.bundles(), strategy="STRICT_PACK", name=ask.node, lifetime=lifetime, bundle_label_selector=selectors
    )
    return group


async def placed(ask: NodeAsk, group: PlacementGroup, cores: int | None, waits: Waits | None = None) -> Placed:
    """The host of a reserved node. `cores`: of this machine, where Ray was not told about them.

    waits None: ResourceExhausted(cause="no_machine") with the numbers, at once if no host could ever hold the node, else after PLACE_S.
    Otherwise this waits as long as it takes, and tells `waits` why as often as that changes.
    """
    if waits is None:
        await _place_soon(ask, group)
    else:
        await _place_at_last(ask, group, waits)
    return find_placed(ask, group, cores)


def find_placed(ask: NodeAsk, group: PlacementGroup, cores: int | None) -> Placed:
    """Where a group that is ready lies."""
    (host_id,) = set(placement_group_table(group)["bundles_to_node_id"].values())
    return Placed(ask, _host(host_id, cores), host_id, group)


async def _place_soon(ask: NodeAsk, group: PlacementGroup) -> None:
    if not can_ever_fit(ask, hosts()):
        raise _no_machine(ask)
    deadline = Deadline.after(PLACE_S)
    while not await asyncio.to_thread(group.wait, min(_SLICE_S, deadline.left_s())):
        if deadline.passed():
            raise _no_machine(ask)


async def _place_at_last(ask: NodeAsk, group: PlacementGroup, waits: Waits) -> None:
    """No deadline: a host comes when an operator brings one. Ends by that, or by the cancellation of whoever builds the node."""
    said, patience = "", Deadline.after(_MIND_S)
    while not await asyncio.to_thread(group.wait, _SLICE_S):
        if patience.passed() and (why := explain_shortage(ask, hosts())) != said:
            said = why
            waits(why)


def hosts() -> list[Host]:
    """Every live host of the Ray cluster. Cores are those Ray was told of, at least 1."""
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    return [_as_host(node, free.get(node["NodeID"], {})) for node in _ray_nodes() if node["Alive"]]


def _host(node_id: str, cores: int | None) -> Host:
    (node,) = [node for node in _ray_nodes() if node["NodeID"] == node_id]
    host = _as_host(node, {})
    return host if cores is None else replace(host, cores=cores)


def _ray_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _as_host(node: dict[str, Any], free: dict[str, float]) -> Host:
    resources, labels = node["Resources"], node["Labels"]
    slots = int(resources.get(RANK_RESOURCE, 0))
    cores = max(1, int(resources.get("CPU", 0)))
    return Host(str(node["NodeManagerAddress"]), cores, slots, int(free.get(RANK_RESOURCE, 0)), labels, _ledger(node))


def _ledger(node: dict[str, Any]) -> str:
    """In Ray's session directory, which Ray tells by the path of its store's socket, under the name of this cluster's namespace."""
    namespace = quote(ray.get_runtime_context().namespace, safe="")
    return str(Path(node["ObjectStoreSocketName"]).parent.parent / f"baton-cores-{namespace}")


def _no_machine(ask: NodeAsk) -> ResourceExhausted:
    return ResourceExhausted(explain_shortage(ask, hosts()), stage="placement", node=ask.node, cause="no_machine")


def release_all(groups: Sequence[PlacementGroup]) -> None:
    """Remove placement groups, reserved or not. Ray kills actors still on them."""
    for group in groups:
        remove_placement_group(group)
