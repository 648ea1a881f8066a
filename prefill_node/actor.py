"""A prefill rank as an actor: a thin shell that cluster/ wraps for Ray. Everything it can do is RankLife's and PrefillNode's."""

from __future__ import annotations

from collections.abc import Sequence

from baton.config import RankPlan
from baton.telemetry import configure_logging
from prefill_node.node import PrefillNode
from ranks.facts import LoadProgress, RankAddress, RankCounts
from ranks.host import RankHost
from ranks.node import RankLife


class PrefillRank:
    """One prefill rank process."""

    def __init__(self, plan: RankPlan) -> None:
        configure_logging(plan.config.log_level)
        self._host = RankHost(plan)
        self._life = RankLife(self._host)

    async def prepare(self) -> RankAddress:
        """Bind ports; where this rank can be reached."""
        return await self._host.prepare()

    async def load(self, addresses: Sequence[RankAddress]) -> None:
        """Join the node's other ranks, load weights, allocate KV, warm up. Raises ConfigError, NodeLost."""
        await self._life.load(addresses)

    async def progress(self) -> LoadProgress:
        """How far `load` is."""
        return self._life.progress()

    async def start(self) -> None:
        """Serve."""
        await self._life.start(PrefillNode(self._host))

    async def counts(self) -> RankCounts:
        """What this rank holds."""
        return self._life.counts()

    async def stop(self) -> None:
        """End everything of this rank."""
        await self._life.stop()

    async def until_failed(self) -> None:
        """Return when this rank cannot step any more: its node must be rebuilt. Waits as long as the rank is well."""
        await self._life.failed.wait()
