"""The life of a rank's process, the same for both roles: prepare, load, start, step until stopped.

A role adds what it serves; see prefill_node/node.py and decode_node/node.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from baton.errors import BatonError, InternalError
from ranks.drive import Drive
from ranks.facts import LoadProgress, RankAddress, RankCounts
from ranks.host import RankHost
from ranks.vigil import Vigil

log = logging.getLogger(__name__)

LAST_STEP_S = 2.0
MOMENT_S = 2.0


class Role(Protocol):
    """What a node's role brings to a rank. Made after the engine has loaded, closed before it goes."""

    @property
    def drive(self) -> Drive:
        """What steps this rank."""

    async def open(self) -> None:
        """Get ready to serve: nobody is served before it returns. The other ranks of the node are up, or about to be.

        It may ask them (see ranks.service.Peer), but what a rank is asked then, it must answer without having asked anybody.
        """

    def counts(self) -> RankCounts:
        """What the rank holds."""

    async def close(self, error: BatonError | None) -> None:
        """End all sequences, with `error` if the rank has failed."""


class RankLife:
    """Brings one rank up and down. State owner: the rank's event loop."""

    def __init__(self, host: RankHost) -> None:
        self.host = host
        self.role: Role | None = None
        self.failed = asyncio.Event()
        self.failure = ""  # why, for whoever watches `failed`
        self._stepping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def prepare(self) -> RankAddress:
        """Bind ports; where this rank can be reached."""
        return await self.host.prepare()

    async def load(self, addresses: Sequence[RankAddress]) -> None:
        """Join the node and load."""
        await self.host.load(addresses)

    async def start(self, make_role: Callable[[RankHost], Role]) -> None:
        """Serve and step in a role: PrefillNode or DecodeNode."""
        self.role = role = make_role(self.host)
        await role.open()
        await self.host.start()
        plan = self.host.plan
        vigil = Vigil(f"{plan.node}/{plan.rank}", role.drive, () if plan.tp_rank else self.host.partners, plan.config.membership)
        self._stepping = asyncio.create_task(self._step_until_closed(role))
        self._watching = asyncio.create_task(vigil.run())

    def progress(self) -> LoadProgress:
        """How far `load` is."""
        return self.host.progress

    def counts(self) -> RankCounts:
        """What the rank holds."""
        return self.role.counts() if self.role else self.host.counts(0, True)

    async def stop(self) -> None:
        """End everything. A step that waits for ranks that have stopped already is broken off by closing the groups."""
        if self._watching:
            self._watching.cancel()
        if self.role and self._stepping:
            self.role.drive.close()
            await self.role.close(None)
            await asyncio.wait([self._stepping], timeout=LAST_STEP_S)
        await self.host.close()
        if self._stepping:
            await asyncio.wait([self._stepping], timeout=LAST_STEP_S)

    async def _step_until_closed(self, role: Role) -> None:
        """A step that fails ends the rank: its group is unusable and the node must be rebuilt as a unit."""
        try:
            await role.drive.run()
        except BatonError as error:
            if role.drive.closing:
                return
            log.error("%s/%d has failed: %s", self.host.plan.node, self.host.plan.rank, error.message)
            await self._fail(role, error)
        except Exception as error:  # the edge of this process: its sequences must end, whatever the bug
            log.exception("%s/%d has failed", self.host.plan.node, self.host.plan.rank)
            await self._fail(role, InternalError(f"step failed: {error!r}", node=self.host.plan.node))

    async def _fail(self, role: Role, error: BatonError) -> None:
        """Tell routers, then stop serving; whoever watches `failed` ends the process, and that ends the rest.

        Nothing here waits for reads, collectives or a step: whatever this rank is stuck in, it must not keep it from dying.
        """
        self.failure = error.message
        try:
            await self._for_a_moment(role.close(error))
            await self._for_a_moment(self.host.hang_up())
        finally:
            self.failed.set()

    async def _for_a_moment(self, closing: Coroutine[Any, Any, None]) -> None:
        """Wait for it, but not for long: it may wait itself, for what a cancel does not end."""
        task = asyncio.create_task(closing)
        try:
            await asyncio.wait({task}, timeout=MOMENT_S)
            if task.done():
                task.result()
        except Exception:  # the edge of this process: half closed or not, it has to end
            log.exception("%s/%d could not close", self.host.plan.node, self.host.plan.rank)
        finally:
            task.cancel()
