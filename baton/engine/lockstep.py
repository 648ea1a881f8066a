"""When the ranks of a lock-step domain sleep and wake: one rank's part of the agreement. Pure: knows no collective, no network.

All ranks of a domain run step 1, 2, 3, … together; a step begins with a size exchange, so all learn the same `all_idle`
from it and fall asleep after the same step N. Between steps each waits on a condition of its own, never in a collective.
A sleeping rank that gets work sends N + 1, the step to join, to all others and joins it itself.

Why no rank is left behind: a step that computes cannot finish before every rank has joined it, so when a sender has finished
N - 1 and N, N being idle, every other rank has at least joined N - 1 (N itself may be no more than a broadcast, which its sender
need not wait for). A rank is therefore asleep after N (joins), still finishing N - 1 or N (remembers), or further on (drops: it
did join N + 1).
"""

from __future__ import annotations

MOST_AHEAD = 3  # steps that a wake may be ahead of a rank: a step that computes is not finished without it


class WakeState:
    """Sleep and wake of one rank. State owner: the rank's loop. A rank is born asleep, having finished step 0.

    How to use it: whenever this rank has work, call `want_wake`; if it returns an epoch, send it to all other ranks and
    join that step. Call `on_wake` for every wake received; if True, join. Call `on_step` after every step; if True, join
    the next one. Messages must arrive, in any order, or the sender must declare the domain dead.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.asleep = True
        self._called_to = 0  # the latest step that another rank has called all to

    def on_wake(self, epoch: int) -> bool:
        """Another rank wants all to join step `epoch`. True if this rank slept and must join it now."""
        assert epoch <= self.epoch + MOST_AHEAD, "a step that computes was finished without this rank"
        self._called_to = max(self._called_to, epoch)
        if epoch != self.epoch + 1 or not self.asleep:
            return False
        self.asleep = False
        return True

    def want_wake(self) -> int | None:
        """This rank has work: the step it now joins and to which it must call all others, or None if it is awake anyway."""
        if not self.asleep:
            return None
        self.asleep = False
        return self.epoch + 1

    def on_step(self, epoch: int, all_idle: bool) -> bool:
        """Step `epoch` is finished and its exchange said whether no rank had work. True: join the next step at once."""
        assert not self.asleep
        assert epoch == self.epoch + 1
        self.epoch = epoch
        self.asleep = all_idle and self._called_to <= epoch
        return not self.asleep
