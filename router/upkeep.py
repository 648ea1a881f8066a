"""What operators and the supervisor do to nodes while requests run: drain, retire, restore, report. Knows no requests by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from baton.deadline import Deadline, now_s
from baton.errors import NotFound
from router.fleet import Fleet
from router.group import Group
from router.membership import NodeReport
from router.notices import Notice


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain came to. idle: nothing of this router is on the node any more. handed_over: sequences that went on elsewhere."""

    idle: bool
    handed_over: int = 0


class Upkeep:
    """State owner: the registry keeps every wish. settle_s: how long a node gets to say that it has let go of what was handed over.

    A node that broke is counted as away from then until it serves or is retired.
    """

    def __init__(self, fleet: Fleet, settle_s: float) -> None:
        self._fleet = fleet
        self._settle_s = settle_s
        self._away_since_s: dict[str, float] = {}

    async def drain(self, node: str, timeout_s: float, *, retire: bool = False) -> Drained:
        """Send no new work to a node; what is still there after timeout_s goes on elsewhere, if there is an elsewhere.

        retire: once it is idle, have its processes ended. A restore meanwhile is the later wish: then neither is done. Raises
        NotFound for an unknown node.
        """
        registry = self._fleet.registry
        self._check_known(node, registry.drain(node))
        self._fleet.notify()
        handed_over, idle = 0, await self._idle(node, timeout_s)
        if not idle and registry.drained(node) and any(registry.usable()):
            handed_over = self._fleet.hand_over(registry.of(node))
            idle = await self._idle(node, self._settle_s)
        if idle and retire:
            self._put("retire", node, registry.of(node), "it is drained")
        return Drained(idle, handed_over)

    def restore(self, node: str) -> None:
        """Let a drained node have work again, and have it built if it was retired. Raises NotFound for an unknown node."""
        groups = self._fleet.registry.restore(node)
        self._check_known(node, groups)
        self._fleet.notices.withdraw("retire", node)
        self._put("restore", node, groups, "it is restored")
        self._fleet.notify()

    def report(self, report: NodeReport) -> None:
        """The supervisor says how a node is; shown to operators and in errors."""
        self._fleet.registry.reports[report.node] = report
        self._count(report)
        self._fleet.notify()

    def _count(self, report: NodeReport) -> None:
        metrics, node = self._fleet.metrics, report.node
        if report.stage == "broken" and node not in self._away_since_s:
            self._away_since_s[node] = now_s()
            metrics.node_dead(node)
        elif report.stage in ("serving", "retired"):
            since_s = self._away_since_s.pop(node, None)
            if since_s is not None and report.stage == "serving":
                metrics.node_back(node, now_s() - since_s)

    def unknown(self, node: str) -> NotFound:
        """The error for a node that nobody knows."""
        registry = self._fleet.registry
        known = sorted({*registry.reports, *(group.node for group in registry.groups())})
        return NotFound(f"there is no node {node!r}; known are {', '.join(known) or 'none'}", stage="router")

    def _check_known(self, node: str, groups: Sequence[Group]) -> None:
        if not groups and node not in self._fleet.registry.reports:
            raise self.unknown(node)

    async def _idle(self, node: str, timeout_s: float) -> bool:
        """Wait until the node is idle; False if it is not by then, or is restored. Nothing of ours is on a group that is not up."""
        registry, deadline = self._fleet.registry, Deadline.after(timeout_s)
        while registry.drained(node) and any(group.up and not group.idle for group in registry.of(node)):
            if not await self._fleet.changed(deadline.left_s()):
                return False
        return registry.drained(node)

    def _put(self, kind: Literal["retire", "restore"], node: str, groups: Sequence[Group], why: str) -> None:
        self._fleet.notices.put(Notice(kind, node, groups[0].address if groups else "", why))
