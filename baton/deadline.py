"""One monotonic deadline per request; every step spends from it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass


def now_s() -> float:
    """Seconds on the clock of the running event loop; on a thread without one, on the system's monotonic clock.

    Outside of the simulator these are the same clock. There, the loop's is virtual, and all that waits on it is too.
    """
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this process's monotonic clock. Between processes only the time left travels."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline `seconds` from now."""
        return cls(now_s() + seconds)

    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - now_s())

    def passed(self) -> bool:
        """Whether no time is left."""
        return now_s() >= self.at_s

    def sooner(self, seconds: float) -> Deadline:
        """The earlier of this deadline and the one `seconds` from now."""
        return Deadline(min(self.at_s, now_s() + seconds))
