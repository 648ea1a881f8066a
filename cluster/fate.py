"""Processes that end with the one that started them. Knows Linux; imports next to nothing: every process of a cluster needs it first."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, even if it is stopped then. Linux; elsewhere nothing.

    Ray's own way asks the process to leave, which one with a call under way does not do (measured on 2.60): it would outlive its
    raylet, and nobody on that host could be asked to end it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
