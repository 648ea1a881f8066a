"""Doing what a plan of faults says to a live cluster. Knows its processes and their sockets; bad clients are guests.py's.

What it does to a process it does by number, and only to processes that the cluster says are its own at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

import psutil

from baton.deadline import now_s
from bench.chaos import stolen
from bench.chaos.faults import Fault, Kind, Record
from bench.chaos.guests import Guests
from bench.chaos.scene import ROUTER, Scene, alive, ended

# A node is built anew within this, or it counts as one that never comes back.
REBUILD_S = 120.0

Later = Coroutine[None, None, None]
Do = Callable[[Fault, Record], Later]


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that has begun. over: until then it lasts, and somebody has to put an end to it or wait for what comes of it."""

    record: Record
    over: asyncio.Task[None]


class Striker:
    """Knows how to do every kind of fault. `extra` are kinds that only some clusters can have."""

    def __init__(self, scene: Scene, guests: Guests, extra: Mapping[Kind, Do]) -> None:
        self._scene = scene
        self._do: dict[Kind, Do] = {
            Kind.KILL: self._kill,
            Kind.STOP: self._stop,
            Kind.ROUTER: self._kill,
            Kind.CUT: self._cut,
            Kind.HALF_OPEN: self._half_open,
            Kind.FULL: guests.fill,
            Kind.SLOW: guests.read_slowly,
            Kind.LEAVE: guests.leave,
            **extra,
        }

    async def strike(self, fault: Fault) -> Struck:
        """Begin it. What is known only afterwards is written into the record until `over`."""
        alone = bool(fault.role) and len(await self._scene.in_service(fault.role)) < 2
        record = Record(fault, now_s(), ROUTER if fault.kind is Kind.ROUTER else fault.target, alone=alone)
        return Struck(record, asyncio.create_task(self._do[fault.kind](fault, record), name=f"fault {fault.number}: {fault.label}"))

    async def _kill(self, fault: Fault, record: Record) -> None:
        process = await self._signalled(record, signal.SIGKILL)
        if process is not None:
            await self._replaced(process, record)

    async def _stop(self, fault: Fault, record: Record) -> None:
        """The cluster has hold_s to end the stopped process; what it leaves alone goes on as if nothing had happened."""
        process = await self._signalled(record, signal.SIGSTOP)
        if process is None:
            return
        await ended(process.pid, fault.hold_s)
        with contextlib.suppress(psutil.NoSuchProcess):  # which looks at more than the number: nobody else's process goes on
            process.send_signal(signal.SIGCONT)
            record.survived = alive(process.pid)
        record.note = f"{'let go on' if record.survived else 'ended'} after {now_s() - record.at_s:.1f} s"
        if not record.survived:
            await self._replaced(process, record)

    async def _signalled(self, record: Record, number: signal.Signals) -> psutil.Process | None:
        """The process that now has the target's name, once it got the signal."""
        try:
            process = psutil.Process((await self._scene.processes())[record.target])
            record.at_s = now_s()
            process.send_signal(number)
        except (KeyError, psutil.NoSuchProcess):
            record.skipped = f"{record.target} has no process just now"
            return None
        return process

    async def _replaced(self, process: psutil.Process, record: Record) -> None:
        if not await self._scene.replaced(record.target, process.pid, REBUILD_S):
            record.broken = f"no other {record.target} within {REBUILD_S:g} s"

    async def _cut(self, fault: Fault, record: Record) -> None:
        link = await self._link(fault, record)
        if link is not None and not stolen.cut(link):
            record.skipped = f"{link}: gone before it could be cut"

    async def _half_open(self, fault: Fault, record: Record) -> None:
        link = await self._link(fault, record)
        if link is None:
            return
        if not stolen.deafen(link):
            record.skipped = f"{link}: gone before it could be touched"
            return
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            there = stolen.heal(link)
        record.note = f"{link.here} deaf for {fault.hold_s:g} s" + ("" if there else "; given up by its ends before")

    async def _link(self, fault: Fault, record: Record) -> stolen.Connection | None:
        """One of the connections between two processes of the cluster."""
        processes = await self._scene.processes()
        if why := stolen.refusal(processes[ROUTER]):
            record.skipped = why
            return None
        links = stolen.connections({pid: name for name, pid in processes.items()})
        if not links:
            record.skipped = "there is no connection just now"
            return None
        link = links[int(fault.pick * len(links))]
        record.at_s, record.target = now_s(), str(link)
        return link
