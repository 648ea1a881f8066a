"""Finds the compiled copying loop (spans.c, built at install by build.py). Where it is missing, Python copies: see memory.py."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache

from kv_transfer.native.build import library_path

log = logging.getLogger(__name__)
# target address, source address, addresses of int64 columns (target offsets, source offsets, lengths), number of spans
CopySpans = Callable[..., None]


@cache
def copy_spans() -> CopySpans | None:
    """The loop, which runs without the interpreter's lock; None (and a word in the log) where it was not built."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError as error:
        log.warning("KV blocks are copied by Python, which is slower where spans are short; `make kernels` compiles the loop (%s)", error)
        return None
    function: CopySpans = library.baton_copy_spans
    library.baton_copy_spans.argtypes = (*(ctypes.c_void_p,) * 5, ctypes.c_int64)
    library.baton_copy_spans.restype = None
    return function
