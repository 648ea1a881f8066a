"""How long calls take beside each other, and what the machine's memory gives. The only file here with a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[int], object]
_MIN_ROUNDS = 5
_MIN_S = 0.002  # shorter runs measure the clock; much longer ones, on a shared machine, the neighbours
_BUDGET_S = 0.4
_BUFFER_BYTES = 1 << 28


def alternated(calls: Sequence[Call]) -> list[float]:
    """Seconds of one call of each: the best of rounds in which they take turns, so that all see the same machine.

    The best and not the median: whatever else runs there only ever adds to a time. A call is given a running number, by which it
    can choose among copies of its data.
    """
    repeats = [_repeats(call) for call in calls]
    best = [float("inf")] * len(calls)
    started, num_rounds = time.perf_counter(), 0
    while num_rounds < _MIN_ROUNDS or time.perf_counter() - started < _BUDGET_S:
        best = [min(so_far, _seconds(call, count)) for so_far, call, count in zip(best, calls, repeats, strict=True)]
        num_rounds += 1
    return best


def memory_bytes_per_s() -> float:
    """The best of reading a buffer far larger than the caches, and of copying it (read and written bytes count)."""
    source, target = torch.zeros(2, _BUFFER_BYTES // 4).unbind(0)
    read_s, copied_s = alternated((lambda _: source.sum(), lambda _: target.copy_(source)))
    return max(_BUFFER_BYTES / read_s, 2 * _BUFFER_BYTES / copied_s)


def _repeats(call: Call) -> int:
    """How often to call for a measurable time. The first call ever may prepare things, and does not count."""
    call(0)
    count = 1
    while (took_s := count * _seconds(call, count)) < _MIN_S:
        count = max(count + 1, int(count * min(10.0, 1.2 * _MIN_S / max(took_s, 1e-9))))
    return count


def _seconds(call: Call, count: int) -> float:
    started = time.perf_counter()
    for number in range(count):
        call(number)
    return (time.perf_counter() - started) / count
