"""How long somebody may say nothing before they count as gone. Pure: counts beats, knows no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass


def beats_in(seconds: float, beat_s: float) -> int:
    """The number of beats that lasts at least so many seconds, one or more."""
    return max(1, math.ceil(seconds / beat_s))


@dataclass(slots=True)
class Silence:
    """Beats in a row without a word, counted by the one who listens: a beat that it has slept through itself counts once.

    patience: how many are too many. judged: False for one who has yet to say a first word, and is loading as far as anyone knows.
    """

    patience: int
    judged: bool = True
    missed: int = 0

    def beat(self, heard: bool) -> bool:
        """One more beat has gone by, with or without a word. True if it was one too many."""
        self.judged |= heard
        self.missed = 0 if heard or not self.judged else self.missed + 1
        return self.missed >= self.patience
