"""How long calls take beside each other, and what the machine's memory gives. The only file here with a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[int], object]
_MIN_S = 0.01  # shorter runs measure the clock and the neighbours
_BUFFER_BYTES = 1 << 28


def alternated(calls: Sequence[Call], num_rounds: int) -> list[float]:
    """Seconds of one call of each: the best of rounds in which they take turns, so that all see the same machine.

    The best and not the median: whatever else runs there only ever adds to a time. A call is given a running number, by which it
    can choose among copies of its data.
    """
    repeats = [_repeats(call) for call in calls]
    rounds = [[_seconds(call, count) for call, count in zip(calls, repeats, strict=True)] for _ in range(num_rounds)]
    return [min(of_call) for of_call in zip(*rounds, strict=True)]


def memory_bytes_per_s(num_rounds: int = 3) -> float:
    """The best of reading a buffer far larger than the caches, and of copying it (read and written bytes count)."""
    source, target = torch.zeros(2, _BUFFER_BYTES // 4).unbind(0)
    calls = (lambda _: source.sum()), (lambda _: target.copy_(source))
    best_s = [min(_seconds(call, 1) for _ in range(num_rounds)) for call in calls]
    return max(_BUFFER_BYTES / best_s[0], 2 * _BUFFER_BYTES / best_s[1])


def _repeats(call: Call) -> int:
    """How often to call for a measurable time; warms up on the way."""
    count = 1
    while (took_s := count * _seconds(call, count)) < _MIN_S:
        count = max(count + 1, int(count * min(10.0, 1.2 * _MIN_S / max(took_s, 1e-9))))
    return count


def _seconds(call: Call, count: int) -> float:
    started = time.perf_counter()
    for number in range(count):
        call(number)
    return (time.perf_counter() - started) / count
