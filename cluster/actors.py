"""The Ray actors of a cluster: shells that load what they run in their own process, so that the launching one stays free of torch.

Knows: which class plays which role. Does not know: what the class does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray

from baton.config import BatonConfig, RankPlan
from baton.telemetry import configure_logging
from ranks.facts import LoadProgress, RankAddress, RankCounts

if TYPE_CHECKING:
    from decode_node.node import DecodeNode
    from prefill_node.node import PrefillNode
    from ranks.node import RankLife
    from router.server import RouterServer


class Rank:
    """One rank process. Ends when the cluster stops it, or dies; `serving` tells whoever waits for that."""

    def __init__(self, plan: RankPlan) -> None:
        configure_logging(plan.config.log_level)
        self._plan = plan
        self._life: RankLife | None = None
        self._end = asyncio.Event()

    async def pid(self) -> int:
        """This process."""
        return os.getpid()

    async def prepare(self) -> RankAddress:
        """Bind ports; where this rank can be reached."""
        # Importing torch takes seconds, and happens here rather than in __init__ so that its failure crosses as what it is.
        self._life = (await asyncio.to_thread(_import_life))(self._plan)
        return await self._life.prepare()

    async def load(self, addresses: list[RankAddress]) -> None:
        """Join the node's other ranks, load weights, allocate KV, warm up. Raises ConfigError, NodeLost."""
        await self._prepared().load(addresses)

    async def progress(self) -> LoadProgress:
        """How far `load` is."""
        return self._prepared().progress()

    async def start(self) -> None:
        """Serve."""
        await self._prepared().start(await asyncio.to_thread(_import_role, self._plan.role))

    async def counts(self) -> RankCounts:
        """Blocks, leases, pulls of this rank."""
        return self._prepared().counts()

    async def stop(self) -> None:
        """End everything of this rank; the process may be killed afterwards."""
        if self._life is not None:
            await self._life.stop()
        self._end.set()

    async def serving(self) -> None:
        """Return when the rank was stopped; a caller whose rank dies gets Ray's error at once.

        A rank that cannot step any more dies on purpose: its weights and blocks are of no use, and its node must be rebuilt.
        """
        ended = asyncio.create_task(self._end.wait())
        failed = asyncio.create_task(self._prepared().failed.wait())
        await asyncio.wait({ended, failed}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        failed.cancel()
        if not self._end.is_set():
            ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def _prepared(self) -> RankLife:
        assert self._life is not None, "prepare() comes first"
        return self._life


class Front:
    """The router process."""

    def __init__(self) -> None:
        self._router: RouterServer | None = None
        self._end = asyncio.Event()

    async def pid(self) -> int:
        """This process."""
        return os.getpid()

    async def start(self, config: BatonConfig) -> dict[str, str]:
        """Listen; {"http": "host:port", "grpc": "host:port"}. Raises ConfigError, and leaves nothing open then."""
        from router.server import RouterServer

        configure_logging(config.log_level)
        self._router = RouterServer(config)
        try:
            return await self._router.start()
        except BaseException:
            await self._router.stop()
            raise

    async def add_group(self, role: str, address: str) -> None:
        """Use the group whose leader listens on `address`."""
        self._started().dispatcher.add_group(role, address)

    async def remove_group(self, address: str) -> None:
        """Use the group whose leader listens on `address` no more; its requests go on elsewhere."""
        await self._started().dispatcher.remove_group(address)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a pair is proven; DeadlineExceeded says why none was."""
        await self._started().wait_ready(timeout_s)

    async def status(self) -> dict[str, object]:
        """Groups, pairs, requests."""
        return self._started().dispatcher.status()

    async def stop(self) -> None:
        """End all requests and close all ports."""
        if self._router is not None:
            await self._router.stop()
        self._end.set()

    async def serving(self) -> None:
        """As Rank's."""
        await self._end.wait()

    def _started(self) -> RouterServer:
        assert self._router is not None, "start() comes first"
        return self._router


def _import_life() -> Callable[[RankPlan], RankLife]:
    from ranks.host import RankHost
    from ranks.node import RankLife

    return lambda plan: RankLife(RankHost(plan))


def _import_role(role: str) -> type[PrefillNode] | type[DecodeNode]:
    if role == "prefill":
        from prefill_node.node import PrefillNode

        return PrefillNode
    from decode_node.node import DecodeNode

    return DecodeNode
