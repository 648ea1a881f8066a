"""What the machine gives in this run: the lines that nothing measured beside them can cross. Measured when first asked for."""

from __future__ import annotations

import ctypes
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from bench.timing import alternated, memory_bytes_per_s

_BEYOND_CACHES_BYTES = 1 << 27
_COPIED_BYTES = 24 * 2**20  # at once: a prompt of 2,000 tokens of the bench model
_GEMM = 1024, 4096, 4096  # rows, depth, columns: large enough that nothing but arithmetic counts

UInt8 = NDArray[np.uint8]
_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None


class Limits:
    """Bytes and operations per second that this process can reach, with the threads that torch has now (memmove: one)."""

    @cached_property
    def memcpy_bytes_per_s(self) -> float:
        """Bytes copied (each is read once and written once) by one thread, from and to memory beyond the caches."""
        source, target = np.ones(_BEYOND_CACHES_BYTES, np.uint8), np.ones(_BEYOND_CACHES_BYTES, np.uint8)
        (seconds,) = alternated([partial(copy_some, source, target, _COPIED_BYTES)])
        return _COPIED_BYTES / seconds

    @cached_property
    def memory_bytes_per_s(self) -> float:
        """Bytes read, or read and written, by all threads."""
        return memory_bytes_per_s()

    @cached_property
    def bf16_flops(self) -> float:
        """Operations per second of a large matrix product in bfloat16."""
        return _gemm_flops(torch.bfloat16)

    @cached_property
    def fp32_flops(self) -> float:
        """The same in float32."""
        return _gemm_flops(torch.float32)


def copy_some(source: UInt8, target: UInt8, nbytes: int, number: int) -> None:
    """One memmove of nbytes from and to places that change with the number, so that caches do not help."""
    at = number * nbytes % (len(source) - nbytes)
    _memmove(target.ctypes.data + at, source.ctypes.data + at, nbytes)


@torch.inference_mode()
def _gemm_flops(dtype: torch.dtype) -> float:
    rows, depth, columns = _GEMM
    x, weight = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    (seconds,) = alternated([lambda _: x @ weight])
    return 2 * rows * depth * columns / seconds
