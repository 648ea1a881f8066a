"""A program that runs to its end, with a limit, and what it printed. Ends with this process: an interrupt kills it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from baton.errors import DeadlineExceeded, InternalError

_SHOWN_CHARS = 2000


def output_of(name: str, words: Sequence[str], limit_s: float) -> str:
    """Its standard output. Raises InternalError with its last words if it fails, DeadlineExceeded if it does not end."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"{name} has not ended after {limit_s:g} s", stage="bench") from error
    if done.returncode:
        raise InternalError(f"{name} failed: {(done.stdout + done.stderr)[-_SHOWN_CHARS:]}", stage="bench")
    return done.stdout
