"""Which cores the threads of an operation run on. Knows GNU's OpenMP, which torch brings and the kernels share; not who computes what."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def bind_threads(cores: Sequence[int]) -> None:
    """Put the calling thread on the first of these cores, and each other thread that will compute with it on one of the rest.

    cores: as many as the thread was told to use, numbered from 0 among those the process may use. It holds until the next call; threads
    that are made later start where the caller is. Linux; elsewhere nothing.
    """
    if sys.platform != "linux":
        return
    allowed = _allowed()
    openmp = _openmp()

    def bind(_: object) -> None:
        number = openmp.omp_get_thread_num() if openmp else 0
        os.sched_setaffinity(0, {allowed[cores[number] % len(allowed)]})

    if openmp is None:
        bind(None)
    else:
        openmp.GOMP_parallel(_Callback(bind), None, len(cores), 0)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The library that this process computes with; torch brings it under a name that differs from build to build."""
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    path = next((name for name in mapped if "libgomp" in name), None)
    return ctypes.CDLL(path) if path else None


def _allowed() -> list[int]:
    """Of the process: its main thread is never bound."""
    return sorted(os.sched_getaffinity(os.getpid()))
