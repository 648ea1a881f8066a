"""One monotonic deadline per request; every step spends from it."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this process's monotonic clock. Between processes only the time left travels."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at_s

    def sooner(self, seconds: float) -> Deadline:
        """The earlier of this deadline and the one `seconds` from now."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))
