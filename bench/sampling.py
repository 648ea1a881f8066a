"""Where a process spends its processor time: samples of the main thread's stack, taken by the processor's clock and not by the wall's."""

from __future__ import annotations

import signal
from collections import Counter
from types import FrameType

INTERVAL_S = 0.001


class Sampler:
    """Takes a sample whenever the process has used INTERVAL_S of processor time, between `start` and `stop`. One per process: it owns
    SIGPROF. A call into C counts for the function that makes it.
    """

    def __init__(self) -> None:
        self._own: Counter[str] = Counter()
        self._within: Counter[str] = Counter()
        self._num = 0

    def start(self) -> None:
        """Begin. Main thread only."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def stop(self) -> None:
        """Take no more samples."""
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)

    def report(self, most: int = 70) -> str:
        """Per function: share of the samples in it, and in it or what it calls."""
        total = max(1, self._num)
        lines = [
            f"{100 * count / total:6.2f}% own {100 * self._own[name] / total:6.2f}%  {name}"
            for name, count in self._within.most_common(most)
        ]
        own = [f"{100 * count / total:6.2f}%  {name}" for name, count in self._own.most_common(most)]
        return "\n".join([f"{self._num} samples", "in it or what it calls:", *lines, "in it alone:", *own])

    def _sample(self, _: int, frame: FrameType | None) -> None:
        self._num += 1
        if frame is not None:
            self._own[_name(frame)] += 1
        seen = set()
        while frame is not None:
            seen.add(_name(frame))
            frame = frame.f_back
        self._within.update(seen)


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_qualname}"
