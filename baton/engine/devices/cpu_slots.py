"""Where the tokens of a step go in the cache: found once per step, the same for every layer. Knows no layer and no operation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from baton.engine.batch import Batch, Int64
from baton.engine.devices import LayerCache


class _Entry(ctypes.Structure):
    """Entry of native/elementwise_of.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
    )


class Slots:
    """One slot per token of the step, in caches of the shape and strides of `like`. Lives as long as the step.

    Token t's slot of head h lies first[t] + h * head_stride elements after the start of a part.
    """

    def __init__(self, batch: Batch, like: LayerCache) -> None:
        part = like.parts[0]
        assert all(other.shape == part.shape and other.stride() == part.stride() for other in like.parts) and part.stride(3) == 1
        _, self.num_kv_heads, block_size, self.dim = part.shape
        self.num_tokens = batch.num_tokens
        owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts))
        blocks = batch.block_tables[owner, batch.positions // block_size] if batch.num_tokens else batch.positions
        self._blocks, self._offsets = blocks.astype(np.int64), (batch.positions % block_size).astype(np.int64)
        self.first: Int64 = self._blocks * part.stride(0) + self._offsets * part.stride(2)
        self._entry = _Entry(self.num_tokens, self.num_kv_heads, self.dim, part.stride(1), self.first.ctypes.data)
        self.address = ctypes.addressof(self._entry)  # for kernels, valid as long as this object

    def write(self, parts: Sequence[torch.Tensor], cache: LayerCache) -> None:
        """BlockAttention.write, in plain torch."""
        blocks, offsets = torch.from_numpy(self._blocks), torch.from_numpy(self._offsets)
        for part, kept in zip(parts, cache.parts, strict=True):
            kept[blocks, :, offsets] = part
