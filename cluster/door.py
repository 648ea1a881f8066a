"""The router's process through its lives, and what it is to know of the nodes: told again, whole, to every new one.

Knows the router's actor. Does not know: how nodes are built, or when a router is started again (cluster/care.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.config import BatonConfig
from baton.errors import NodeLost
from cluster.actors import Front
from cluster.calls import create_actor, end_actor, end_of, reason, result
from cluster.hosts import Located, kill_everywhere, successor
from cluster.messages import Lost
from cluster.placement import Waits
from cluster.plan import FRONT
from router.membership import NodeReport
from router.notices import Notice

log = logging.getLogger(__name__)

_POLL_S = 5.0
_TELL_S = 8.0
_DEATH_S = 1.0


class Door:
    """A `Ward` (see care.py). State owner: the loop of the cluster it is part of.

    host_id: Ray's id of the host whose addresses the configuration means. addresses: where it listens; ports that were chosen for
    port 0 stay, so that clients find the next router where the last one was. silence_s: after which a router that answers
    nothing is as good as dead.
    """

    name = FRONT

    def __init__(self, config: BatonConfig, host_id: str, *, detached: bool, silence_s: float, on_notice: Callable[[Notice], None]) -> None:
        self.addresses: dict[str, str] = {}
        self._config = config
        self._host_id = host_id
        self._detached = detached
        self._silence_s = silence_s
        self._on_notice = on_notice
        self._actor: ActorHandle[Any] | None = None
        self._process: Located | None = None
        self._strays: list[Located] = []
        self._groups: dict[tuple[str, int], str] = {}
        self._reports: dict[str, NodeReport] = {}
        self._told_groups: dict[tuple[str, int], str] = {}
        self._told_reports: dict[str, NodeReport] = {}
        self._news = asyncio.Event()

    @property
    def pid(self) -> int:
        """Its process; 0 while there is none."""
        return self._process.mark.pid if self._actor is not None and self._process is not None else 0

    @property
    def processes(self) -> list[Located]:
        """All that may be alive of it."""
        return [*([self._process] if self._process else []), *self._strays]

    def pid_of(self, name: str) -> int | None:
        """As Node's."""
        return self._process.mark.pid if name == FRONT and self._process else None

    async def place(self, waits: Waits | None = None) -> None:
        """Its host and no other, or the one that has come in its place under the same address."""
        host_id = successor(self._host_id)
        if host_id is None:
            raise NodeLost("the host of the router is gone, and only there can it have its address", stage="placing", node=FRONT)
        self._host_id = host_id

    async def start(self) -> None:
        """A process."""
        here = NodeAffinitySchedulingStrategy(self._host_id, soft=False)
        self._actor = create_actor(Front, FRONT, (), {"num_cpus": 0, "scheduling_strategy": here}, detached=self._detached)
        self._process = await result(FRONT, "start", self._actor.process.remote())

    async def load(self) -> None:
        """Listen, and learn of all nodes. Raises ConfigError for a port that is taken: by the last router's socket, for a moment."""
        self.addresses = await result(FRONT, "start", self._asked.start.remote(self._with_ports()))
        self._told_groups, self._told_reports = {}, {}
        await self.settle()

    async def broken(self) -> tuple[Lost, ...]:
        """Return when the router has ended or is silent; meanwhile, take its notices and tell it what is new."""
        doing = [asyncio.create_task(work) for work in (end_of(self._asked), self._listen(), self._tell())]
        try:
            done, _ = await asyncio.wait(doing, return_when=asyncio.FIRST_COMPLETED)
            (first, *_) = (task for task in doing if task in done)
            return (Lost(name=FRONT, pid=self.pid, reason=first.result(), ended=first is doing[0]),)
        finally:
            for task in doing:
                task.cancel()
            await asyncio.gather(*doing, return_exceptions=True)

    def condemned(self, address: str, why: str) -> Lost | None:
        """The router condemns others."""
        return None

    async def end(self, *, gently: bool = False) -> None:
        """As Node's."""
        actor, self._actor = self._actor, None
        if actor is not None:
            if gently:
                await end_actor(actor)
            ray.kill(actor, no_restart=True)
        self._strays = await kill_everywhere(self.processes)
        if self._strays:
            log.warning("the router is not known to have ended: pid %s", ", ".join(str(item.mark.pid) for item in self._strays))

    def give_back(self) -> None:
        """It holds no slots."""

    def adopt(
        self, actor: ActorHandle[Any], process: Located | None, addresses: dict[str, str], groups: Mapping[tuple[str, int], str]
    ) -> None:
        """Take over a router that an earlier supervisor has left. addresses: empty if it does not listen. groups: all it knows."""
        self._actor, self._process, self.addresses = actor, process, addresses
        self._told_groups = dict(groups)

    def show(self, groups: Mapping[tuple[str, int], str], reports: Mapping[str, NodeReport]) -> None:
        """What the router is to know from now on: the role of each (leader's address, life of its node), and how every node is."""
        self._groups, self._reports = dict(groups), dict(reports)
        self._news.set()

    async def settle(self) -> None:
        """Tell the router what it does not know yet. Raises NodeLost if it does not take it within _TELL_S."""
        try:
            async with asyncio.timeout(_TELL_S):
                while await self._tell_one():
                    pass
        except TimeoutError as error:
            raise NodeLost(f"the router has not taken news of its nodes within {_TELL_S:g} s", stage="router", node=FRONT) from error

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a launch is complete; DeadlineExceeded and Unavailable say why it is not."""
        await result(FRONT, "serve", self._asked.wait_ready.remote(timeout_s))

    async def status(self) -> dict[str, object]:
        """What the router says of groups, pairs, nodes and requests. NodeLost while there is none."""
        answer: dict[str, object] = await result(FRONT, "report", self._asked.status.remote())
        return answer

    async def wind_down(self, drain_s: float) -> None:
        """Have it take no more requests, let those that run finish for drain_s, and close its ports. One that dies is done, too."""
        try:
            async with asyncio.timeout(drain_s + _TELL_S):
                await self._asked.stop.remote(drain_s)
        except (RayActorError, RayTaskError, NodeLost, TimeoutError) as error:
            log.warning("the router could not wind down: %s", reason(error))

    @property
    def _asked(self) -> ActorHandle[Any]:
        if self._actor is None:
            raise NodeLost("there is no router now; it is being started again", stage="router", node=FRONT)
        return self._actor

    def _with_ports(self) -> BatonConfig:
        if not self.addresses:
            return self._config
        ports = {f"{kind}_port": int(address.rpartition(":")[2]) for kind, address in self.addresses.items()}
        return self._config.model_copy(update={"router": self._config.router.model_copy(update=ports)})

    async def _listen(self) -> str:
        """Pass on its notices, until it does not answer any more: a router that hangs keeps every client waiting."""
        after, limit_s = 0, _POLL_S + self._silence_s
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    heard = await result(FRONT, "report", self._asked.notices.remote(after, _POLL_S))
            except TimeoutError:
                return f"it has answered nothing for {limit_s:g} s"
            except NodeLost as error:
                return await self._if_not_dead(error)
            for number, notice in heard:
                after = number
                self._on_notice(notice)

    async def _tell(self) -> str:
        while True:
            self._news.clear()
            try:
                await self.settle()
            except NodeLost as error:
                return await self._if_not_dead(error)
            await self._news.wait()

    async def _if_not_dead(self, error: NodeLost) -> str:
        """What is wrong, after a moment: if the router has died, whoever watches for that is to say so."""
        await asyncio.sleep(_DEATH_S)
        return error.message

    async def _tell_one(self) -> bool:
        """Tell one thing it does not know; False if there is none. What went goes first: an address may be given to another life."""
        router = self._asked
        if gone := next((group for group in self._told_groups if group not in self._groups), None):
            await result(FRONT, "forget a group", router.remove_group.remote(gone[0]))
            del self._told_groups[gone]
        elif new := next((group for group in self._groups if group not in self._told_groups), None):
            role = self._groups[new]
            await result(FRONT, "add a group", router.add_group.remote(role, new[0]))
            self._told_groups[new] = role
        elif report := next((item for item in self._reports.values() if self._told_reports.get(item.node) != item), None):
            await result(FRONT, "hear of a node", router.report_node.remote(report))
            self._told_reports[report.node] = report
        else:
            return False
        return True
