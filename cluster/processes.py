"""Processes named so that no other can be meant: on which machine, which pid, since when. Knows the operating system, not Ray.

A pid is given away again; a pid together with the time it began at is not. What kills here kills what it was told to or nothing.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from baton.deadline import Deadline

_LOOK_S = 0.01
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """One process for good. machine: see `this_machine`; began: when it did, on a clock of that machine that is never set."""

    machine: str
    pid: int
    began: int


def this_machine() -> str:
    """Where pids mean the same: equal for two processes exactly if they run under one kernel, in one space of pids, in one boot."""
    if _BOOT_ID.exists():
        return f"{_BOOT_ID.read_text(encoding='ascii').strip()}/{os.readlink(_PID_NAMESPACE)}"
    return f"{platform.node()}/{int(psutil.boot_time())}"


def own_mark() -> ProcessMark:
    """This process."""
    mark = mark_of(os.getpid())
    assert mark is not None, "it runs"
    return mark


def own_age_s() -> float:
    """Seconds since this process began, before its first line of Python."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) - _began(os.getpid()) / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def mark_of(pid: int) -> ProcessMark | None:
    """The process that has this pid now; None if none has, or only one that has ended and waits for its parent to hear of it."""
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        return ProcessMark(this_machine(), pid, _began(pid))
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def marks_of(pids: Sequence[int]) -> list[ProcessMark]:
    """Those of these pids that are processes now."""
    return [mark for pid in pids if (mark := mark_of(pid)) is not None]


def living(marks: Iterable[ProcessMark]) -> list[ProcessMark]:
    """Those of this machine's processes that have not ended."""
    return [mark for mark in marks if mark_of(mark.pid) == mark]


def kill(marks: Sequence[ProcessMark], within_s: float) -> list[ProcessMark]:
    """SIGKILL processes of this machine, which ends stopped ones too, and wait until they are gone; those that are not within_s later.

    Only one that the kernel itself holds (waiting for a disk, say) can be left.
    """
    here = living(marks)
    processes = [psutil.Process(mark.pid) for mark in here]
    for process, mark in zip(processes, here, strict=True):
        if mark_of(mark.pid) == mark:  # psutil sees by itself if the pid is given away from here on
            _kill(process)
    deadline = Deadline.after(within_s)
    while (left := living(here)) and not deadline.passed():  # the kernel tells only a process's parent
        time.sleep(_LOOK_S)
    return left


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return  # it has ended meanwhile, which is what was asked for


def _began(pid: int) -> int:
    """Clock ticks since boot on Linux: psutil's time of day would seem to move when the host's clock is set."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return int(psutil.Process(pid).create_time() * 1e6)
    after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(after_name[19])  # field 22 of proc(5), starttime; the name is field 2
