"""Gaps between tokens of streams while all of them run. Pure: times in, gaps out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from baton.errors import InternalError

_SKIPPED = 8  # tokens of each stream at the start, when the others' prompts are still computed


def common_window(streams: Sequence[Sequence[float]]) -> tuple[float, float]:
    """From when every stream has said a few tokens to when the first one ends. streams: times of tokens, seconds."""
    return max(times[min(_SKIPPED, len(times) - 1)] for times in streams), min(times[-1] for times in streams)


def gaps_within(streams: Sequence[Sequence[float]], start_s: float, end_s: float) -> list[float]:
    """Gaps between neighbouring tokens that began and ended in the window."""
    return [after - before for times in streams for before, after in pairwise(times) if start_s <= before and after <= end_s]


def summary(gaps: Sequence[float]) -> dict[str, float]:
    """Milliseconds. Raises InternalError if there are none."""
    if not gaps:
        raise InternalError("there was no moment at which all streams ran: make them longer", stage="bench")
    values = np.array(gaps) * 1e3
    return {
        "num_gaps": float(len(values)),
        "mean_itl_ms": float(values.mean()),
        "median_itl_ms": float(np.median(values)),
        "p99_itl_ms": float(np.percentile(values, 99)),
        "max_itl_ms": float(values.max()),
    }


def rate_of(ends_s: Sequence[float]) -> float:
    """Ends per second, from the first to the last: what came before the first is the way there. Raises InternalError for under three."""
    if len(ends_s) < 3:
        raise InternalError(f"{len(ends_s)} prompts ended while the streams ran: too few to tell a rate from", stage="bench")
    return (len(ends_s) - 1) / (max(ends_s) - min(ends_s))
