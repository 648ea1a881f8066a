"""What the router has to tell whoever builds nodes: condemn, retire, restore. Knows neither nodes nor supervisor."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

from baton.telemetry import fields

log = logging.getLogger(__name__)

MAX_NOTICES = 256


@dataclass(frozen=True, slots=True)
class Notice:
    """One wish. condemn: a group of the node was silent for too long, end the node and build it anew; retire: the node is drained,
    end its processes and give back its slots; restore: it shall serve again, build it if it was retired.

    address: of the group's leader, so that a notice about a life that has passed can be told from one about the present.
    node: the node's name; the address where it has never said its name.
    """

    kind: Literal["condemn", "retire", "restore"]
    node: str
    address: str
    why: str


class Notices:
    """State owner: the router's loop. A notice is made by `put` and ends when it is taken, or withdrawn.

    There is one per kind and node: a newer one takes the place of one that nobody took. If nobody ever takes any (a router
    without a supervisor), the oldest ends when there are MAX_NOTICES.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], Notice] = {}
        self._some = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, notice: Notice) -> None:
        """Have it taken."""
        log.warning("notice", extra=fields(kind=notice.kind, node=notice.node, address=notice.address, why=notice.why))
        self.withdraw(notice.kind, notice.node)
        self._waiting[notice.kind, notice.node] = notice
        if len(self._waiting) > MAX_NOTICES:
            del self._waiting[next(iter(self._waiting))]
        self._some.set()

    def withdraw(self, kind: Literal["condemn", "retire", "restore"], node: str) -> None:
        """Take a notice back, if it still waits."""
        self._waiting.pop((kind, node), None)

    async def take(self, timeout_s: float) -> tuple[Notice, ...]:
        """All that wait, the oldest first; waits for one, and returns () if none comes within timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._waiting:
                    self._some.clear()
                    await self._some.wait()
        except TimeoutError:
            return ()
        taken = tuple(self._waiting.values())
        self._waiting.clear()
        return taken
