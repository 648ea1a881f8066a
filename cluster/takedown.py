"""`baton down`: a detached cluster ends, and it is proven that nothing of it is left.

Knows Ray's tables and hosts. Does not know: what the processes did.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayActorError, RayTaskError

from baton.deadline import Deadline
from cluster import census
from cluster.calls import STOP_S, end_actor
from cluster.hosts import ANSWER_S, KILL_S, Located, kill_everywhere
from cluster.placement import release_all
from cluster.plan import FRONT, SUPERVISOR

_STOP_S = 2 * STOP_S + KILL_S + ANSWER_S
_SETTLE_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Down:
    """What became of a cluster. num_ended: processes that are proven to be gone; the others are what is left: nothing, if all is well."""

    num_ended: int
    processes: tuple[Located, ...]
    actors: tuple[str, ...]
    num_groups: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left."""
        return not (self.processes or self.actors or self.num_groups)

    def said(self, name: str) -> str:
        """For people; what is left is listed."""
        first = f"{name} is down: {self.num_ended} processes ended, {len(self.processes)} left, {self.num_groups} placement groups left"
        pids = [f"left: pid {item.mark.pid} on Ray host {item.host_id}" for item in self.processes]
        return "\n".join([first, *pids, *(f"left: the actor {actor}" for actor in self.actors)])


async def take_down(name: str) -> Down:
    """End everything of a cluster in the namespace of the connection: its supervisor first, so that nothing is built again.

    Processes are counted before and looked for afterwards, on their hosts, by pid and the time they began.
    """
    found = dict.fromkeys([*await census.processes(census.actor_names(name)), *await _stop_supervisor()])
    names = census.actor_names(name)  # what a supervisor that had died, or did not answer, has left
    found.update(dict.fromkeys(await census.processes(names)))
    await _end_all(names)
    release_all(census.groups())
    left = await kill_everywhere(found)
    actors, num_groups = await _settled(name)
    return Down(len(found) - len(left), tuple(left), actors, num_groups)


async def _stop_supervisor() -> Sequence[Located]:
    """Have it take everything down, then end it for good. Its processes of before, of earlier lives as well."""
    supervisor = census.actor(SUPERVISOR)
    if supervisor is None:
        return ()
    processes: Sequence[Located] = ()
    try:
        async with asyncio.timeout(_STOP_S):
            processes = (await supervisor.describe.remote()).processes
            await supervisor.stop.remote()
    except (RayActorError, RayTaskError, TimeoutError) as error:
        said = f"the supervisor could not take the cluster down ({type(error).__name__}); its processes are ended one by one"
        print(said, file=sys.stderr)
    ray.kill(supervisor, no_restart=True)
    return processes


async def _end_all(names: Iterable[str]) -> None:
    """The router first: it ends the requests."""
    actors = {name: found for name in names if name != SUPERVISOR and (found := census.actor(name)) is not None}
    for first in (True, False):
        await asyncio.gather(*(end_actor(actor) for name, actor in actors.items() if (name == FRONT) is first))


async def _settled(name: str) -> tuple[tuple[str, ...], int]:
    """Actors and placement groups that Ray still lists. It takes a moment to forget them, and gets _SETTLE_S."""
    deadline = Deadline.after(_SETTLE_S)
    while (census.actor_names(name) or census.groups()) and not deadline.passed():  # noqa: ASYNC110  Ray has nothing to wait on
        await asyncio.sleep(_POLL_S)
    return tuple(census.actor_names(name)), len(census.groups())
