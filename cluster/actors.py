"""The Ray actors of a cluster: shells that load what they run in their own process, so that the launching one stays free of torch.

Knows: which class plays which role. Does not know: what the class does.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.config import BatonConfig, RankPlan
from baton.telemetry import configure_logging
from cluster.fate import die_with_parent
from cluster.hosts import Located, own_host_id
from cluster.processes import own_mark
from ranks.cores import SPIN
from ranks.facts import LoadProgress, RankAddress, RankCounts

if TYPE_CHECKING:
    from decode_node.node import DecodeNode
    from prefill_node.node import PrefillNode
    from ranks.node import RankLife
    from router.membership import NodeReport
    from router.notices import Notice
    from router.server import RouterServer

_MAX_UNHEARD = 512


@dataclass(frozen=True, slots=True)
class RankSelf:
    """What a rank says of itself to a supervisor that has lost track of it. serving: it has started and neither failed nor stopped."""

    plan: RankPlan
    process: Located
    address: RankAddress | None
    serving: bool


@dataclass(frozen=True, slots=True)
class FrontSelf:
    """What the router says of itself to a supervisor that has lost track of it. addresses: empty while it does not listen.

    groups: (role, address) of all it knows.
    """

    process: Located
    addresses: dict[str, str]
    groups: tuple[tuple[str, str], ...]


class Rank:
    """One rank process. Ends when the cluster stops it, with its raylet, or dies; `serving` tells whoever waits for that."""

    def __init__(self, plan: RankPlan) -> None:
        die_with_parent()
        os.environ.update({**SPIN, **os.environ})  # nothing has imported torch, unless this is a private Ray, which has it from the start
        configure_logging(plan.config.log_level)
        self._plan = plan
        self._life: RankLife | None = None
        self._address: RankAddress | None = None
        self._started = False
        self._end = asyncio.Event()

    async def process(self) -> Located:
        """This process."""
        return located()

    async def describe(self) -> RankSelf:
        """What it is, and how far it has come."""
        serving = self._started and not self._end.is_set() and not self._prepared().failed.is_set()
        return RankSelf(self._plan, located(), self._address, serving)

    async def prepare(self) -> RankAddress:
        """Bind ports; where this rank can be reached."""
        # Importing torch takes seconds, and happens here rather than in __init__ so that its failure crosses as what it is.
        self._life = (await asyncio.to_thread(_import_life))(self._plan)
        self._address = await self._life.prepare()
        return self._address

    async def load(self, addresses: list[RankAddress]) -> None:
        """Join the node's other ranks, load weights, allocate KV, warm up. Raises ConfigError, NodeLost."""
        await self._prepared().load(addresses)

    async def progress(self) -> LoadProgress:
        """How far `load` is."""
        return self._life.progress() if self._life else LoadProgress("waiting")

    async def start(self) -> None:
        """Serve."""
        await self._prepared().start(await asyncio.to_thread(_import_role, self._plan.role))
        self._started = True

    async def counts(self) -> RankCounts:
        """Blocks, leases, pulls of this rank."""
        return self._prepared().counts()

    async def stop(self) -> None:
        """End everything of this rank; the process may be killed afterwards."""
        if self._life is not None:
            await self._life.stop()
        self._end.set()

    async def serving(self) -> str:
        """Why the rank serves no more, once it does not: "" if it was stopped. A caller whose rank dies gets Ray's error at once.

        A rank that cannot step any more is of no use, and may be stuck in a collective that keeps its process from leaving: it waits
        here to be killed, with all of its node.
        """
        life = self._prepared()
        ended = asyncio.create_task(self._end.wait())
        failed = asyncio.create_task(life.failed.wait())
        await asyncio.wait({ended, failed}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        failed.cancel()
        return "" if self._end.is_set() else f"it cannot step any more: {life.failure}"

    def _prepared(self) -> RankLife:
        assert self._life is not None, "prepare() comes first"
        return self._life


class Front:
    """The router process. Ends as a rank does.

    Notices are handed out with a number, and kept until the asker has shown, by its next number, that it has them: an answer may
    get lost with a supervisor. Beyond _MAX_UNHEARD the oldest go; the router condemns again who stays silent.
    """

    def __init__(self) -> None:
        die_with_parent()
        self._router: RouterServer | None = None
        self._addresses: dict[str, str] = {}
        self._unheard: deque[tuple[int, Notice]] = deque(maxlen=_MAX_UNHEARD)
        self._num_notices = 0
        self._end = asyncio.Event()

    async def process(self) -> Located:
        """This process."""
        return located()

    async def describe(self) -> FrontSelf:
        """Where it listens, and which groups it knows."""
        groups = self._router.dispatcher.fleet.registry.groups() if self._router and self._addresses else ()
        return FrontSelf(located(), self._addresses, tuple((group.role.value, group.address) for group in groups))

    async def start(self, config: BatonConfig) -> dict[str, str]:
        """Listen; {"http": "host:port", "grpc": "host:port"}. Raises ConfigError, and leaves nothing open then."""
        from router.server import RouterServer

        configure_logging(config.log_level)
        self._router = RouterServer(config)
        try:
            self._addresses = await self._router.start()
        except BaseException:
            await self._router.stop()
            raise
        gc.collect()
        gc.freeze()  # modules and the tokenizer stay: looking through them again and again would cost every request
        return self._addresses

    async def add_group(self, role: str, address: str) -> None:
        """Use the group whose leader listens on `address`."""
        self._started().dispatcher.add_group(role, address)

    async def remove_group(self, address: str) -> None:
        """Use the group whose leader listens on `address` no more; its requests go on elsewhere."""
        await self._started().dispatcher.remove_group(address)

    async def report_node(self, report: NodeReport) -> None:
        """How a node is, for operators and for errors that clients read."""
        self._started().dispatcher.report_node(report)

    async def notices(self, after: int, timeout_s: float) -> list[tuple[int, Notice]]:
        """What the router wants of its supervisor, with numbers above `after`; waits for the first, up to timeout_s."""
        while self._unheard and self._unheard[0][0] <= after:
            self._unheard.popleft()
        if not self._unheard:
            for notice in await self._started().dispatcher.notices.take(timeout_s):
                self._num_notices += 1
                self._unheard.append((self._num_notices, notice))
        return list(self._unheard)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a launch is complete; DeadlineExceeded says how things stand if it is not by then."""
        await self._started().wait_ready(timeout_s)

    async def status(self) -> dict[str, object]:
        """Groups, pairs, nodes, requests."""
        return self._started().dispatcher.status()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Give running requests drain_s seconds, end the rest and close all ports."""
        if self._router is not None:
            await self._router.stop(drain_s)
        self._end.set()

    async def serving(self) -> str:
        """As Rank's."""
        await self._end.wait()
        return ""

    def _started(self) -> RouterServer:
        assert self._router is not None, "start() comes first"
        return self._router


def located() -> Located:
    """This process, for whoever may have to end it."""
    return Located(own_mark(), own_host_id())


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
