"""The Ray actors of a cluster: shells that load what they run in their own process, so that the launching one stays free of torch.

Knows: which class plays which role. Does not know: what the class does.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import ray

from baton.config import BatonConfig, RankPlan
from ranks.facts import LoadProgress, RankAddress, RankCounts

if TYPE_CHECKING:
    from decode_node.actor import DecodeRank
    from prefill_node.actor import PrefillRank
    from router.actor import RouterActor


class Rank:
    """One rank process. Ends when the cluster stops it, or dies; `serving` tells whoever waits for that."""

    def __init__(self, plan: RankPlan) -> None:
        self._plan = plan
        self._rank: PrefillRank | DecodeRank | None = None
        self._end = asyncio.Event()

    async def pid(self) -> int:
        """This process."""
        return os.getpid()

    async def prepare(self) -> RankAddress:
        """Bind ports; where this rank can be reached."""
        # Importing torch takes seconds, and happens here rather than in __init__ so that its failure crosses as what it is.
        kind = await asyncio.to_thread(_class_of, self._plan.role)
        self._rank = kind(self._plan)
        return await self._rank.prepare()

    async def load(self, addresses: list[RankAddress]) -> None:
        """Join the node, load weights, allocate KV, warm up."""
        await self._prepared().load(addresses)

    async def progress(self) -> LoadProgress:
        """How far `load` is."""
        return await self._prepared().progress()

    async def start(self) -> None:
        """Serve."""
        await self._prepared().start()

    async def counts(self) -> RankCounts:
        """Blocks, leases, pulls of this rank."""
        return await self._prepared().counts()

    async def stop(self) -> None:
        """End everything of this rank; the process may be killed afterwards."""
        if self._rank is not None:
            await self._rank.stop()
        self._end.set()

    async def serving(self) -> None:
        """Return when the rank was stopped; a caller whose rank dies gets Ray's error at once.

        A rank that cannot step any more dies on purpose: its weights and blocks are of no use, and its node must be rebuilt.
        """
        ended = asyncio.create_task(self._end.wait())
        failed = asyncio.create_task(self._prepared().until_failed())
        await asyncio.wait({ended, failed}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        failed.cancel()
        if not self._end.is_set():
            ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def _prepared(self) -> PrefillRank | DecodeRank:
        assert self._rank is not None, "prepare() comes first"
        return self._rank


class Front:
    """The router process."""

    def __init__(self) -> None:
        self._router: RouterActor | None = None
        self._end = asyncio.Event()

    async def pid(self) -> int:
        """This process."""
        return os.getpid()

    async def start(self, config: BatonConfig) -> dict[str, str]:
        """Listen; {"http": "host:port", "grpc": "host:port"}."""
        from router.actor import RouterActor

        self._router = RouterActor()
        return await self._router.start(config)

    async def add_group(self, role: str, address: str) -> None:
        """Use the group whose leader listens on `address`."""
        await self._started().add_group(role, address)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a pair is proven; DeadlineExceeded says why none was."""
        await self._started().wait_ready(timeout_s)

    async def status(self) -> dict[str, object]:
        """Groups, pairs, requests."""
        return await self._started().status()

    async def stop(self) -> None:
        """End all requests and close all ports."""
        if self._router is not None:
            await self._router.stop()
        self._end.set()

    async def serving(self) -> None:
        """As Rank's."""
        await self._end.wait()

    def _started(self) -> RouterActor:
        assert self._router is not None, "start() comes first"
        return self._router


def _class_of(role: str) -> type[PrefillRank] | type[DecodeRank]:
    if role == "prefill":
        from prefill_node.actor import PrefillRank

        return PrefillRank
    from decode_node.actor import DecodeRank

    return DecodeRank
