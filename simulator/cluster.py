"""A simulated cluster: router, prefill and decode nodes, and a model of the supervisor that rebuilds them.

The supervisor here does what cluster/ does with Ray: it notices a dead process after a while, ends the rest of its node, starts
the node anew after another while, and tells the router. Knows nothing of faults: whoever orders them calls `kill` and the network.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from router.membership import NodeReport, Stage
from router.notices import Notice
from simulator.groups import MakeLeader, SimGroup
from simulator.invariants import leftovers, watch
from simulator.network import Network
from simulator.reading import Reaches, Source
from simulator.router import SimRouter
from simulator.schedule import NodePlan, Schedule

ROUTER_REBUILD_S = 0.8
HOST_LOST_S = 12.0  # until a supervisor finds out about a host that is gone, if the router does not


class SimNode:
    """One node through all its lives. groups: of the present life, empty while there is none."""

    def __init__(self, plan: NodePlan) -> None:
        self.plan = plan
        self.groups: list[SimGroup] = []
        self.lives = 0
        self.retired = False


class SimCluster:
    """State owner: the world. counts: what happened, by name. groups_ever: of all lives, whose memory may still be read.

    on_router_lost: called when the router dies, is stopped or begins to leave. router_leaves: whether it takes no more requests.
    """

    def __init__(self, network: Network, schedule: Schedule, chance: random.Random, make_leader: MakeLeader) -> None:
        self.network = network
        self.nodes = {plan.name: SimNode(plan) for plan in schedule.nodes}
        self.counts: Counter[str] = Counter()
        self.groups_ever: list[SimGroup] = []
        self.on_router_lost: Callable[[], None] | None = None
        self.router_leaves = False
        self._schedule = schedule
        self._chance = chance
        self._make_leader = make_leader
        for node in self.nodes.values():
            self._start(node)
        self.router = self._new_router()

    # Looking at it.

    @property
    def absent(self) -> bool:
        """Whether there is no router that takes requests now."""
        return self.router.process.halted or self.router_leaves

    def groups(self) -> list[SimGroup]:
        """All that live."""
        return [group for node in self.nodes.values() for group in node.groups]

    def group(self, name: str) -> SimGroup | None:
        """The present life of a group, if it has one."""
        return next((group for group in self.groups() if group.name == name), None)

    def whole(self) -> bool:
        """Whether every node lives and the router has proven every pair."""
        if self.absent or not self.router.started:
            return False
        living = all(node.groups and not any(group.process.dead for group in node.groups) for node in self.nodes.values())
        return living and all(pair.usable for pair in self.router.dispatcher.fleet.registry.pairs())

    def leftovers(self) -> list[str]:
        """What is held anywhere although nobody wants anything."""
        found = [what for group in self.groups() for what in leftovers(group.name, group.leader)]
        dispatcher = self.router.dispatcher
        found += [f"router: {dispatcher.num_running} requests run"] if dispatcher.num_running else []
        found += [f"router: {dispatcher.fleet.num_carriers} carriers"] if dispatcher.fleet.num_carriers else []
        return found

    # The supervisor.

    def kill(self, group: SimGroup) -> None:
        """SIGKILL of one group's process."""
        self.network.kill(group.process)
        self.network.loop.later(self._schedule.detect_s, self._lost, group, "a rank died")

    def vanish(self, group: SimGroup) -> None:
        """One group's process is gone, and with it whoever could have said so: its links fall silent."""
        for link in self.network.links(group.process):
            self.network.silence(link)
        self.network.kill(group.process)
        self.network.loop.later(HOST_LOST_S, self._lost, group, "its host was lost")

    def restart_router(self, drain_s: float) -> None:
        """SIGTERM: requests get drain_s seconds to finish, then the router goes and another comes."""
        router = self.router
        self.router_leaves = True
        if self.on_router_lost is not None:
            self.on_router_lost()

        async def leave() -> None:
            await router.dispatcher.wind_down(drain_s)
            await router.dispatcher.close()
            self.network.loop.later(0.0, self._router_left, router)

        router.process.do(lambda: router.process.spawn(leave()))

    def _router_left(self, router: SimRouter) -> None:
        if router is self.router and not router.process.dead:
            self.kill_router()

    def kill_router(self) -> None:
        """SIGKILL of the router; it comes back at the same address."""
        self._close_books()
        self.network.kill(self.router.process)
        if self.on_router_lost is not None:
            self.on_router_lost()
        self.network.loop.later(ROUTER_REBUILD_S, self._restart_router)

    def _restart_router(self) -> None:
        if self.router.process.dead:
            self.router, self.router_leaves = self._new_router(), False

    def _new_router(self) -> SimRouter:
        known: list[tuple[str, str]] = [(group.node.role, group.address) for group in self.groups()]
        return SimRouter(self.network, self._schedule.config, random.Random(self._chance.random()), known, self._noticed)

    def _start(self, node: SimNode) -> None:
        node.lives += 1
        node.groups = [self._new_group(node, index) for index in range(node.plan.groups)]
        self.groups_ever += node.groups
        for group in node.groups:
            group.start(self._make_leader, watch)

    def _new_group(self, node: SimNode, index: int) -> SimGroup:
        address = f"{node.plan.name}:{index}.{node.lives}"
        return SimGroup(
            self.network,
            node.plan,
            index,
            self._schedule.config,
            address,
            random.Random(self._chance.random()),
            self._reaches,
            self._ends,
        )

    def _reaches(self, reader: SimGroup) -> Reaches:
        def source(incarnation: bytes) -> Source | None:
            for group in self.groups_ever:
                if group.seat.incarnation == incarnation:
                    return Source(group.seat.memory, self.network.link(reader.process, group.process), group.node.shared)
            return None

        return source

    def _ends(self, group: SimGroup, why: str) -> None:
        self.network.loop.later(0.0, self._ended, group, why)

    def _ended(self, group: SimGroup, why: str) -> None:
        """A process has ended itself."""
        self.counts["ended by themselves"] += 1
        self.network.kill(group.process)
        self._lost(group, why)

    def _lost(self, group: SimGroup, why: str) -> None:
        """Rebuild the group's node as a unit, unless that is under way or done."""
        node = self.nodes[group.node.name]
        if group in node.groups:
            self.counts["rebuilt"] += 1
            self._end(node)
            self._report(node, "broken", why)
            self.network.loop.later(self._schedule.rebuild_s, self._rebuild, node, why)

    def _end(self, node: SimNode) -> None:
        gone, node.groups = node.groups, []
        for group in gone:
            self.network.kill(group.process)
            self.router.remove_group(group.address)

    def _rebuild(self, node: SimNode, why: str) -> None:
        self._start(node)
        self._report(node, "serving", why)
        for group in node.groups:
            self.router.add_group(node.plan.role, group.address)

    def _report(self, node: SimNode, stage: Stage, why: str) -> None:
        report = NodeReport(node.plan.name, node.plan.role, stage, why, node.lives)
        self.router.process.do(lambda: self.router.dispatcher.report_node(report))

    def _noticed(self, notice: Notice) -> None:
        """The router condemns, retires or restores. A notice about a life that has passed means nobody."""
        node = self.nodes.get(notice.node)
        group = next((group for group in self.groups() if group.address == notice.address), None)
        if notice.kind == "condemn" and group is not None:
            self.counts["condemned"] += 1
            self._lost(group, notice.why)
        elif notice.kind == "retire" and node is not None and group is not None:
            self.counts["retired"] += 1
            node.retired = True
            self._end(node)
            self._report(node, "retired", notice.why)
        elif notice.kind == "restore" and node is not None and node.retired:
            node.retired = False
            self._rebuild(node, notice.why)

    def _close_books(self) -> None:
        """Take over what a router has counted, before it is gone."""
        for what, count in self.router.counted().items():
            self.counts[what] += count
