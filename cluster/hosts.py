"""Processes on whichever Ray host they run: killed for certain, and asked after. Knows Ray's hosts and how to run a function there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.errors import NodeLost
from cluster.processes import ProcessMark, kill, living, this_machine

ANSWER_S = 5.0
KILL_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Located:
    """A process and Ray's id of the host it runs on."""

    mark: ProcessMark
    host_id: str


async def kill_everywhere(found: Iterable[Located], within_s: float = KILL_S) -> list[Located]:
    """Kill processes wherever they run, and wait until they are gone; those that are not known to be, about within_s later.

    Processes on a host that Ray has given up count as gone: they end with their raylet (see fate.die_with_parent).
    """
    return await _at_each(found, kill, within_s, within_s=within_s + ANSWER_S)


async def living_everywhere(found: Iterable[Located]) -> list[Located]:
    """Those that have not ended, or whose host does not say."""
    return await _at_each(found, living, within_s=ANSWER_S)


async def answers(host_id: str) -> bool:
    """Whether a host does what it is told within ANSWER_S. Ray itself takes many seconds to see that one is gone."""
    if host_id == own_host_id():
        return True
    try:
        await on_host(host_id, this_machine, within_s=ANSWER_S)
    except NodeLost:
        return False
    return True


async def on_host(host_id: str, work: Callable[..., T], *arguments: object, within_s: float) -> T:
    """What a function that processes on other hosts can import returns there. NodeLost if it does not within within_s seconds."""
    pinned = NodeAffinitySchedulingStrategy(host_id, soft=False)
    task: Any = ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
    reference = task.remote(*arguments)
    try:
        async with asyncio.timeout(within_s):
            answer: T = await reference
            return answer
    except TimeoutError as error:
        ray.cancel(reference, force=True)
        raise NodeLost(f"host {host_id[:8]} has not answered within {within_s:g} s", stage="host", cause="no_answer") from error
    except RayError as error:
        raise NodeLost(f"host {host_id[:8]} could not be asked: {type(error).__name__}", stage="host", cause="no_answer") from error


def own_host_id() -> str:
    """Ray's id of the host this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def host_alive(host_id: str) -> bool:
    """Whether Ray counts on a host still."""
    return successor(host_id) == host_id


def successor(host_id: str) -> str | None:
    """This host while it lives; else one that lives at its address, where Ray was started anew; None if there is neither."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    address = next((node["NodeManagerAddress"] for node in nodes if node["NodeID"] == host_id), "")
    there = [node["NodeID"] for node in nodes if node["Alive"] and node["NodeManagerAddress"] == address]
    return host_id if host_id in there else next(iter(there), None)


async def _at_each(found: Iterable[Located], work: Callable[..., list[ProcessMark]], *more: object, within_s: float) -> list[Located]:
    """What is left of processes after `work(marks, *more)`, which runs in a thread for this machine's and on their hosts for all others."""
    machine = this_machine()
    hosts_of = {item.mark: item.host_id for item in found}
    by_host: dict[str, list[ProcessMark]] = {}
    for mark, host_id in hosts_of.items():
        by_host.setdefault("" if mark.machine == machine else host_id, []).append(mark)

    async def at(host_id: str, marks: list[ProcessMark]) -> list[ProcessMark]:
        if not host_id:
            return await asyncio.to_thread(work, marks, *more)
        try:
            return await on_host(host_id, work, marks, *more, within_s=within_s)
        except NodeLost:
            return marks if host_alive(host_id) else []

    left = await asyncio.gather(*(at(host_id, marks) for host_id, marks in by_host.items()))
    return [Located(mark, hosts_of[mark]) for marks in left for mark in marks]
