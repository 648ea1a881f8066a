"""The cluster as somebody sees it who breaks it: which processes there are, what is in service, what every rank holds.

Knows the kept cluster and the metrics page. Does not know faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from http.client import HTTPConnection, HTTPException
from typing import Any

import psutil

from baton.config import BatonConfig
from baton.deadline import Deadline
from baton.errors import BatonError
from cluster.kept import KeptCluster
from ranks.facts import RankCounts

_LOOK_S = 0.25
_POLL_S = 0.05
_METRICS_S = 3.0
_RETRIES = re.compile(r'^baton_retries_total\{cause="([^"]*)"\} ([0-9.e+]+)$', re.MULTILINE)
ROUTER = "router"


class Scene:
    """Owner of what was counted of router lives that are over. All questions go to the keeper or the router, and have deadlines there."""

    def __init__(self, cluster: KeptCluster, config: BatonConfig) -> None:
        assert cluster.info is not None, "not started"
        self._cluster = cluster
        self._http = cluster.info.http
        self._num_groups = config.prefill.nodes + config.decode.nodes * config.decode.dp
        self._num_ranks = config.num_ranks
        self._retries: dict[int, dict[str, int]] = {}
        self.unbalanced: list[str] = []

    async def processes(self) -> dict[str, int]:
        """The process of every rank and of the router, by name, as they are now."""
        info = await asyncio.to_thread(self._cluster.processes)
        return {ROUTER: info.router_pid, **{rank.name: rank.pid for rank in info.ranks}}

    async def missing(self) -> str:
        """What is not in service, in words; "" if everything is."""
        try:
            status = await asyncio.to_thread(self._cluster.status)
        except BatonError as error:
            return f"the router does not answer: {error.message}"
        return self._missing_of(status)

    def _missing_of(self, status: dict[str, Any]) -> str:
        self._weigh(status)
        ready = [group["name"] for group in status["groups"] if group["state"] == "ready"]
        if len(ready) < self._num_groups:
            return f"in service are only {', '.join(sorted(ready)) or 'none'}: {status['summary']}"
        unusable = [f"{pair['prefill']} to {pair['decode']}" for pair in status["pairs"] if not pair["usable"]]
        return f"not proven: {', '.join(unusable)}" if unusable else ""

    def _weigh(self, status: dict[str, Any]) -> None:
        """Every group's blocks add up, at any time."""
        for group in status["groups"]:
            blocks = group["load"]["blocks"]
            if blocks["free"] + blocks["cached"] + blocks["held"] + blocks["quarantined"] != blocks["total"]:
                self.unbalanced.append(f"{group['name']}: {blocks}")

    async def in_service(self, role: str) -> set[str]:
        """Names of the nodes of a role that take work; none if the router does not answer."""
        try:
            status = await asyncio.to_thread(self._cluster.status)
        except BatonError:
            return set()
        return {group["node"] for group in status["groups"] if group["role"] == role and group["state"] == "ready"}

    async def whole(self, timeout_s: float) -> str:
        """Wait until everything is in service; what is missing after timeout_s, "" if nothing is."""
        deadline = Deadline.after(timeout_s)
        while True:
            missing = await self.missing()
            if not missing or deadline.passed():
                return missing
            await asyncio.sleep(_LOOK_S)

    async def replaced(self, name: str, pid: int, timeout_s: float) -> bool:
        """Wait until the process called `name` is another one than `pid`; whether it was within the time."""
        deadline = Deadline.after(timeout_s)
        while not deadline.passed():
            if not alive(pid) and (await self._processes_or_none()).get(name, pid) != pid:
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def _processes_or_none(self) -> dict[str, int]:
        try:
            return await self.processes()
        except BatonError:
            return {}

    async def leaks(self, timeout_s: float) -> list[str]:
        """What ranks still hold after timeout_s, one line per rank that is not idle; none as soon as all are."""
        deadline = Deadline.after(timeout_s)
        while True:
            found = await self._held()
            if not found or deadline.passed():
                return found
            await asyncio.sleep(_LOOK_S)

    async def _held(self) -> list[str]:
        try:
            counts = await asyncio.to_thread(self._cluster.counts)
        except BatonError as error:
            return [f"the ranks cannot be counted: {error.message}"]
        return [_in_words(rank) for rank in counts if not rank.idle()]

    async def count_retries(self) -> None:
        """Read what the router says about sequences dispatched again; its successor starts from nothing, so this is kept by life."""
        try:
            pid = (await self.processes())[ROUTER]
            page = await asyncio.to_thread(_read, self._http, "/metrics")
        except (BatonError, HTTPException, OSError):
            return  # no router just now: what it had counted last is kept
        self._retries[pid] = {cause: int(float(number)) for cause, number in _RETRIES.findall(page)}

    def retries(self) -> dict[str, int]:
        """Sequences dispatched again, by cause, over all lives of the router."""
        total: dict[str, int] = {}
        for life in self._retries.values():
            for cause, number in life.items():
                total[cause] = total.get(cause, 0) + number
        return total


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped; one that only waits to be buried does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def ended(pid: int, timeout_s: float) -> bool:
    """Whether a process ends within the time."""
    deadline = Deadline.after(timeout_s)
    while not deadline.passed():
        if not alive(pid):
            return True
        await asyncio.sleep(_POLL_S)
    return not alive(pid)


def _in_words(rank: RankCounts) -> str:
    kinds = ("held", "quarantined", "open_leases", "open_pulls", "sequences")
    facts = {"held": rank.held, "quarantined": rank.quarantined, "open_leases": rank.open_leases}
    facts |= {"open_pulls": rank.open_pulls, "sequences": rank.sequences}
    counted = rank.free + rank.cached + rank.held + rank.quarantined
    said = ", ".join(f"{facts[kind]} {kind.replace('_', ' ')}" for kind in kinds if facts[kind])
    return f"{rank.node}/{rank.rank}: {said or f'{counted} of {rank.total} blocks accounted for'}"


def _read(address: str, path: str) -> str:
    connection = HTTPConnection(address, timeout=_METRICS_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()
