"""Finds the kernels that fit this processor: C compiled at install (build.py), loaded with ctypes. Knows no kernel by name.

Who calls kernels keeps their argument types in a table of its own (`kernel`) and a torch path beside them, which serves where
`library` is None and is what tests compare with. Kernels take bfloat16 and float32; other dtypes stay with torch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from baton.engine.devices.native.build import Level, levels, library_path, sources_hash

__all__ = ["Found", "Kernel", "find", "fitting", "kernel", "library", "opened"]

log = logging.getLogger(__name__)
_CPUINFO = Path("/proc/cpuinfo")
_FLAG_LINES = ("flags", "Features")  # x86's word and arm's
_SUFFIXES = {torch.bfloat16: "_bf16", torch.float32: "_f32"}  # what a kernel's name ends with, by element type
Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The library of the best level that this processor has, or None and why. Loaded once, and kept while the process lives."""

    library: ctypes.CDLL | None
    how: str


def library() -> ctypes.CDLL | None:
    """The kernels, or None: then torch alone must do. Calls release the GIL."""
    return find().library


@cache
def find() -> Found:
    """The same, with a word about it for people. Never raises; which way is used is logged, once."""
    missing = "no kernels are made for this processor"
    for level in fitting():
        try:
            found = opened(library_path(level))
        except OSError as error:
            missing = str(error)
            continue
        log.debug("the cpu is used through %s kernels", level.name)
        return Found(found, f"{level.name} kernels")
    log.warning("the cpu is used through torch alone, which is slower: %s", missing)
    return Found(None, f"torch alone: {missing}")


def fitting() -> list[Level]:
    """The levels that this processor has, best first."""
    flags = _flags()
    return [level for level in levels() if level.needs <= flags]


def opened(path: Path) -> ctypes.CDLL:
    """The library in this file. Raises OSError if it was not built, cannot be loaded or was made of other sources than are there now."""
    if not path.exists():
        raise OSError(f"{path} is not there; with a C compiler, `make kernels` builds it")
    found = ctypes.CDLL(str(path))
    if _made_of(found) != sources_hash():
        raise OSError(f"{path} was made of other sources; `make kernels` builds it anew")
    return found


def kernel(kernels: ctypes.CDLL, name: str, arguments: Sequence[type]) -> Mapping[torch.dtype, Kernel]:
    """The kernel `name` for both element types, called with these C types; it returns nothing. Calling one takes about 1 us."""
    functions = {dtype: kernels[name + suffix] for dtype, suffix in _SUFFIXES.items()}
    for function in functions.values():
        function.argtypes, function.restype = tuple(arguments), None
    return functions


def _made_of(kernels: ctypes.CDLL) -> str:
    about = kernels.baton_sources
    about.restype = ctypes.c_char_p
    said: bytes = about()
    return said.decode()


def _flags() -> frozenset[str]:
    """What the first processor can do, in the kernel's words; empty where there is no /proc/cpuinfo."""
    if not _CPUINFO.exists():
        return frozenset()
    with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
        words = (line.partition(":") for line in lines)
        return next((frozenset(value.split()) for name, _, value in words if name.strip() in _FLAG_LINES), frozenset())
