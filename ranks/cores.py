"""Who computes on which of a host's cores: each rank on its own, and for as long as others are idle on theirs as well.

The ranks of one cluster on one host share a small file. Each says in it that it is in a step, between steps, or idle, and reads before
every step, and between its layers, what the others say. So a core that was lent comes back within one layer of its borrower, and one
that falls idle is of use as soon.
Knows cores by number from 0, and pids. Does not know: torch, what a step is, or where the file lies.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

# For the environment of a rank, before torch is imported: how long an OpenMP thread that has computed looks for more before it sleeps, in
# looks of some 50 ns: 0.2 ms, which is longer than from one parallel loop of a step to the next and shorter than from step to step. GNU's
# default is 300,000: it would keep a lent core from its owner for 15 ms after a step. With 0, every loop would wake threads anew.
SPIN = {"GOMP_SPINCOUNT": "4000"}
# A rank that has work goes from one step to the next in less than this; if it does not, its cores are better used than kept waiting.
PAUSE_MS = 50
# A step that takes longer than this may be that of a process that has died in it.
BELIEVED_MS = 250
# After a step that lost by borrowing: how long to keep to one's own cores, at first and at last, seconds.
_FIRST_WAIT_S, _LAST_WAIT_S = 0.1, 2.0
_WORDS = 2  # per slot, of 8 bytes: who, and what it does
_WORD_BYTES = 8


class Doing(Enum):
    """What a rank says of itself. PAUSED: between two steps, with work left. The number is what is written."""

    IDLE = 0
    PAUSED = 1
    STEPPING = 2


@dataclass(frozen=True, slots=True)
class Slot:
    """What one rank has written. own: its cores; age_ms: since it began to do what it does, or said so last."""

    pid: int
    own: Sequence[int]
    doing: Doing
    age_ms: int


def cores_now(cores: int, owns: Sequence[Sequence[int]], me: int) -> tuple[int, ...]:
    """The cores a rank may use: its own first, then a fair share of those that no busy rank owns.

    cores: how many the host has; they are numbered from 0. owns: of all ranks that are busy now, in slot order; me: the index of the
    asking one. All busy ranks together use every core, and none twice that is nobody's twice from the start.
    """
    owned = {core for own in owns for core in own}
    spare = [core for core in range(cores) if core not in owned]
    return (*owns[me], *spare[me :: len(owns)])


def own_cores(cores: int, first: int, num: int) -> tuple[int, ...]:
    """`num` cores from number `first` on; beyond the last one it begins anew: that host was promised to too many."""
    return tuple((first + i) % cores for i in range(num))


def is_busy(slot: Slot, alive: Callable[[int], bool]) -> bool:
    """Whether the cores of a rank are its own now. alive: whether a process of this pid runs; asked only about those that seem stuck."""
    match slot.doing:
        case Doing.IDLE:
            return False
        case Doing.PAUSED:
            return slot.age_ms <= PAUSE_MS
        case Doing.STEPPING:
            return slot.age_ms <= BELIEVED_MS or alive(slot.pid)


@dataclass(frozen=True, slots=True)
class Caution:
    """Whether borrowed cores were worth it lately. A core that no rank uses may still be busy: with the router, or another's program.

    until_s: no core is borrowed before that; wait_s: how long that was.
    """

    until_s: float = 0.0
    wait_s: float = 0.0

    def allows(self, now_s: float) -> bool:
        """Whether to borrow now."""
        return now_s >= self.until_s

    def after(self, now_s: float, worth: bool) -> Caution:
        """What a step on borrowed cores has taught: to go on, or to keep off, for longer every time in a row, and try again then."""
        wait_s = 0.0 if worth else min(_LAST_WAIT_S, max(_FIRST_WAIT_S, 2 * self.wait_s))
        return Caution(now_s + wait_s, wait_s)


def was_worth_it(num_own: int, num_used: int, cpu_s: float, wall_s: float) -> bool:
    """Whether a step gained by borrowing, from the time its main thread computed (and did not wait for others, or for a core).

    On its own cores alone it would have computed num_used / num_own times as long: below that share of its time borrowing is a loss.
    It has to be well above, halfway to a step that never waited.
    """
    return cpu_s >= wall_s * (1 + num_own / num_used) / 2


class Ledger:
    """A rank's slot in its cluster's file on this host, and its view of the others. Owner: the rank's step thread; `close` ends it.

    One word per fact, and only its owner writes it, so nobody locks: who reads an older word is wrong for one step at most.
    A rank that dies leaves its slot as it was: IDLE or PAUSED ends by itself, STEPPING is seen through by its pid. The rank built in
    its place takes the slot over. The file goes with its directory; in one that stays, with the last rank that closes, and only
    if all ranks are killed at once it is left there, for the next cluster of that name. The mapping lives as long as the process, so
    that a step which outlasts `close` has something to write to.
    """

    def __init__(self, path: Path, *, slot: int, num_slots: int, first: int, num: int, cores: int) -> None:
        """path: the same for all ranks of the cluster on this host, in a directory that exists. first, num: this rank's own of `cores`."""
        self._path, self._slot, self._num_slots, self._cores = path, slot, num_slots, cores
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = num_slots * _WORDS * _WORD_BYTES
            os.ftruncate(file, max(size, os.fstat(file).st_size))
            self._words = memoryview(mmap.mmap(file, size)).cast("q")
        finally:
            os.close(file)
        self._say(Doing.IDLE)
        self._words[slot * _WORDS] = os.getpid() << 32 | first << 16 | num

    def enter(self) -> tuple[int, ...]:
        """Begin a step; the cores for it. Says so before it looks, so that of two that begin together one sees the other."""
        self._say(Doing.STEPPING)
        return self.look()

    def look(self) -> tuple[int, ...]:
        """The cores that are this rank's now, in a step."""
        slots = [(slot, self.read(slot)) for slot in range(self._num_slots)]
        busy = [(slot, said.own) for slot, said in slots if said is not None and (slot == self._slot or is_busy(said, _alive))]
        return cores_now(self._cores, [own for _, own in busy], [slot for slot, _ in busy].index(self._slot))

    def leave(self, *, idle: bool) -> None:
        """End a step. idle: there is no work for another; otherwise the cores are kept for PAUSE_MS."""
        self._say(Doing.IDLE if idle else Doing.PAUSED)

    def read(self, slot: int) -> Slot | None:
        """What a rank of this host has written, None for one that was never here."""
        who, does = self._words[slot * _WORDS], self._words[slot * _WORDS + 1]
        if not who:
            return None
        own = own_cores(self._cores, who >> 16 & 0xFFFF, who & 0xFFFF)
        return Slot(who >> 32, own, Doing(does & 3), max(0, _now_ms() - (does >> 2)))

    def close(self) -> None:
        """Give the slot back; the last of the host removes the file."""
        self._words[self._slot * _WORDS] = 0
        others = [said for slot in range(self._num_slots) if (said := self.read(slot)) is not None]
        if not any(_alive(said.pid) for said in others):
            self._path.unlink(missing_ok=True)

    def _say(self, doing: Doing) -> None:
        self._words[self._slot * _WORDS + 1] = _now_ms() << 2 | doing.value


def _now_ms() -> int:
    """A clock that all processes of a host share (CLOCK_MONOTONIC)."""
    return time.monotonic_ns() // 1_000_000


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
