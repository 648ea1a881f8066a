"""Faults of a schedule, done to a cluster at their times and undone after a while. Knows no promises."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from baton.errors import BatonError, InternalError
from simulator.cluster import SimCluster
from simulator.groups import SimGroup
from simulator.link import Link
from simulator.loop import Process
from simulator.schedule import Fault, Kind

STUCK_S = 25.0


class Faults:
    """State owner: the world. done: how many of each kind took place; one whose target was gone did not."""

    def __init__(self, cluster: SimCluster, note: Callable[[str], None]) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._network = cluster.network
        self._note = note
        self._over = False
        self._slow: list[SimGroup] = []
        self._stopped: list[Process] = []
        self._drained: dict[str, None] = {}
        self._ways: dict[Kind, Callable[[Fault], bool]] = {
            "kill": self._kill,
            "vanish": self._vanish,
            "stop": self._stop,
            "leave": self._leave,
            "slow": self._slow_down,
            "fail step": self._fail_step,
            "no token": self._spoil,
            "stuck read": self._stick,
            "cut": self._cut,
            "silence": self._silence,
            "lossy": self._lose_some,
            "kill router": self._kill_router,
            "stop router": self._stop_router,
            "restart router": self._restart_router,
            "drain": self._drain,
            "retire": self._drain,
            "flush": self._flush,
        }

    async def run(self, faults: tuple[Fault, ...]) -> None:
        """All of them, at their times, in order."""
        began_s = self._network.loop.now_s
        for fault in faults:
            await asyncio.sleep(max(0.0, began_s + fault.at_s - self._network.loop.now_s))
            self._do(fault)

    def end(self) -> None:
        """No more faults: undo what lasts."""
        self._over = True
        for link in list(self._network.all_links()):
            self._network.heal(link)
            self._network.lose_some(link, False)
        for process in self._stopped:
            process.resume()
        for group in self._slow:
            group.seat.slowness = 1.0
        for group in self._cluster.groups():
            group.seat.tokenless = False
        for node in self._drained:
            self._restore(node)

    def _do(self, fault: Fault) -> None:
        took_place = self._ways[fault.kind](fault)
        self._note(f"fault: {fault}" + ("" if took_place else " (nobody there)"))
        self.done[fault.kind] += took_place

    def _later(self, fault: Fault, undo: Callable[[], None]) -> None:
        def undo_now() -> None:
            if not self._over:
                self._note(f"over: {fault.kind} {fault.target} {fault.far}")
                undo()

        self._network.loop.later(fault.lasts_s, undo_now)

    def _kill(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None or group.process.dead:
            return False
        self._cluster.kill(group)
        return True

    def _vanish(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None or group.process.dead:
            return False
        self._cluster.vanish(group)
        return True

    def _leave(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None or group.process.halted:
            return False
        group.leave()
        return True

    def _stick(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None:
            return False
        group.reader.stuck_s = STUCK_S
        return True

    def _stop(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None or group.process.halted:
            return False
        self._pause(fault, group.process)
        return True

    def _pause(self, fault: Fault, process: Process) -> None:
        self._network.stop(process)
        self._stopped.append(process)
        self._later(fault, process.resume)

    def _slow_down(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None:
            return False
        group.seat.slowness = fault.strength
        self._slow.append(group)
        self._later(fault, lambda: self._speed_up(group))
        return True

    @staticmethod
    def _speed_up(group: SimGroup) -> None:
        group.seat.slowness = 1.0

    def _fail_step(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None:
            return False
        group.seat.failing = InternalError("the device has failed", stage=group.node.role, node=group.name, cause="device")
        return True

    def _spoil(self, fault: Fault) -> bool:
        group = self._cluster.group(fault.target)
        if group is None:
            return False
        group.seat.tokenless = True
        return True

    def _link(self, fault: Fault) -> Link | None:
        """Between a group and the router, or a decode group and a prefill node."""
        group = self._cluster.group(fault.target)
        other = self._cluster.group(fault.far) if fault.far else None
        if group is None or (fault.far and other is None):
            return None
        near, far = (group.process, other.process) if other is not None else (self._cluster.router.process, group.process)
        return self._network.link(near, far)

    def _cut(self, fault: Fault) -> bool:
        link = self._link(fault)
        if link is not None:
            self._network.cut(link)
        return link is not None

    def _silence(self, fault: Fault) -> bool:
        link = self._link(fault)
        if link is None:
            return False
        self._network.silence(link, there=fault.there, back=fault.back)
        self._later(fault, lambda: self._network.heal(link))
        return True

    def _lose_some(self, fault: Fault) -> bool:
        link = self._link(fault)
        if link is None:
            return False
        self._network.lose_some(link, True)
        self._later(fault, lambda: self._network.lose_some(link, False))
        return True

    def _kill_router(self, fault: Fault) -> bool:
        if self._cluster.router.process.dead:
            return False
        self._cluster.kill_router()
        return True

    def _restart_router(self, fault: Fault) -> bool:
        if self._cluster.absent:
            return False
        self._cluster.restart_router(fault.lasts_s)
        return True

    def _stop_router(self, fault: Fault) -> bool:
        process = self._cluster.router.process
        if process.halted:
            return False
        if self._cluster.on_router_lost is not None:
            self._cluster.on_router_lost()
        self._pause(fault, process)
        return True

    def _drain(self, fault: Fault) -> bool:
        node, router = fault.target, self._cluster.router
        self._drained[node] = None

        async def drain() -> None:
            try:
                await router.dispatcher.drain(node, fault.lasts_s, retire=fault.kind == "retire")
            except BatonError as error:
                self._note(f"drain {node}: {error}")

        router.process.do(lambda: router.process.spawn(drain()))
        self._network.loop.later(2 * fault.lasts_s, self._restore, node)
        return True

    def _restore(self, node: str) -> None:
        router = self._cluster.router

        def restore() -> None:
            try:
                router.dispatcher.restore(node)
            except BatonError as error:
                self._note(f"restore {node}: {error}")

        router.process.do(restore)

    def _flush(self, fault: Fault) -> bool:
        router = self._cluster.router

        async def flush() -> None:
            try:
                await router.dispatcher.flush_cache(fault.target)
            except BatonError as error:
                self._note(f"flush {fault.target}: {error}")

        router.process.do(lambda: router.process.spawn(flush()))
        return True
