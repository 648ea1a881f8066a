"""Memory that is there before it is needed. Knows addresses, not what lies there.

The first touch of a page costs a fault: 24 MB of fresh pages are copied at 1.5 GB/s instead of 13. A pool's pages would be touched first
by the steps and pulls of the first some hundred requests, each a little slower for it. Kernels older than 5.14 cannot do it, and a
machine that is out of memory will not: then the first touch does, or fails, as ever.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

from kv_transfer.pool import address_of

STEP_BYTES = 2**20  # half a millisecond: what waits for the thread waits no longer
_POPULATE_READ = 22  # of madvise(2)
_POPULATE_WRITE = 23

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int


def ahead(buffer: memoryview, *, write: bool) -> Iterator[None]:
    """Have all pages of a buffer mapped, step by step, without changing what is in them; for writing, or only for reading."""
    start = address_of(buffer)
    for at in range(start - start % mmap.PAGESIZE, start + len(buffer), STEP_BYTES):
        if _madvise(at, min(STEP_BYTES, start + len(buffer) - at), _POPULATE_WRITE if write else _POPULATE_READ):
            return
        yield
