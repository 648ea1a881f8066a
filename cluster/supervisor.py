"""The actor of `baton up`: launches a cluster and keeps it whole after the command has ended.

Ray starts it again if it dies; it then takes over what it finds (adopt.py) instead of launching a second cluster.
Knows: a Cluster and who asks about it. Does not know: terminals.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from pydantic import BaseModel

from baton.config import BatonConfig
from baton.errors import BatonError, InternalError
from baton.telemetry import configure_logging
from cluster import census
from cluster.actors import located
from cluster.adopt import adopt
from cluster.fate import die_with_parent
from cluster.hosts import Located
from cluster.launch import Cluster
from cluster.messages import Facts, Failed, News, Ready
from cluster.plan import FRONT
from router.membership import NodeReport

log = logging.getLogger(__name__)

_MAX_SAID = 1024


@dataclass(frozen=True, slots=True)
class Kept:
    """What a supervisor answers for: itself, how every node is, every process that may be alive, and why nothing runs, if so."""

    process: Located
    nodes: tuple[NodeReport, ...]
    processes: tuple[Located, ...]
    failure: str = ""


class Supervisor:
    """State owner of the cluster; ends with `stop` and the kill that follows it. What it says is kept up to _MAX_SAID lines.

    host_id: Ray's id of the host where the addresses in the configuration are meant.
    """

    def __init__(self, config: BatonConfig, host_id: str) -> None:
        die_with_parent()
        configure_logging(config.log_level)
        self._cluster = Cluster(config, detached=True, host_id=host_id)
        self._said: deque[tuple[int, str]] = deque(maxlen=_MAX_SAID)
        self._num_said = 0
        self._more = asyncio.Event()
        self._failure = ""
        self._launched = False
        # An actor with async methods is made on its loop. The command that makes the first one has seen that nothing is there.
        again = bool(census.groups()) or census.actor(FRONT) is not None
        self._running = asyncio.create_task(self._run(again=again))

    async def said(self, after: int, timeout_s: float) -> list[tuple[int, str]]:
        """Messages (see messages.EVENT) with numbers above `after`, as JSON; waits for the first, up to timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._num_said <= after:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            return []
        return [(number, line) for number, line in self._said if number > after]

    async def describe(self) -> Kept:
        """What it keeps, and how that is."""
        return Kept(located(), tuple(self._cluster.reports()), tuple(self._cluster.located()), self._failure)

    async def stop(self) -> list[Located]:
        """Take everything down; the processes that could not be proven to have ended: none. This actor itself is for the caller."""
        self._running.cancel()
        await asyncio.wait([self._running])
        return await self._cluster.stop()

    async def _run(self, *, again: bool) -> None:
        try:
            await (self._take_over() if again else self._launch())
        except BatonError as error:
            await self._fail(error)
        except Exception as error:  # the edge of this process: whoever waits for the cluster must hear of everything
            log.exception("the supervisor has failed")
            await self._fail(InternalError(f"{type(error).__name__}: {error}", stage="launch", cause="launch_failed"))

    async def _launch(self) -> None:
        await self._cluster.up(self._say)
        self._launched = True
        self._say(Ready(info=self._cluster.processes()))
        await self._cluster.keep(self._tell)

    async def _take_over(self) -> None:
        """Also where a launch was under way: what is not whole is built, as after any loss."""
        log.warning("started again; taking over what runs")
        self._launched = True
        await adopt(self._cluster)
        keeping = self._cluster.keep(self._tell)
        whole = asyncio.create_task(self._cluster.whole())
        try:
            await asyncio.wait({keeping, whole}, return_when=asyncio.FIRST_COMPLETED)
            if whole.done():
                self._say(Ready(info=self._cluster.processes()))
            await keeping
        finally:
            whole.cancel()

    async def _fail(self, error: BatonError) -> None:
        """A first launch that failed leaves nothing behind. One that is kept is not taken down for a bug in its supervision."""
        self._failure = error.message
        if not self._launched:
            await self._cluster.stop()
        self._say(Failed(error=Facts.of(error)))

    def _tell(self, news: News) -> None:
        log.info("%s", news.said())
        self._say(news)

    def _say(self, message: BaseModel) -> None:
        self._num_said += 1
        self._said.append((self._num_said, message.model_dump_json()))
        self._more.set()
