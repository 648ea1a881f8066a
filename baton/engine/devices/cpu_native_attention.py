"""Attention over blocks by compiled kernels (native/attention.c). See baton.engine.devices for shapes.

What depends on the step alone is laid out in memory once, so that a layer costs one call of a few microseconds.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import numpy as np
import torch

from baton.engine.batch import Int32
from baton.engine.devices import LayerCache
from baton.engine.devices.cpu_gathered import GatheredAttention
from baton.engine.devices.cpu_plan import Contexts, LatentDims
from baton.engine.devices.cpu_units import units
from baton.engine.devices.native import kernel

# With fewer rows times keys than this, waking another thread takes longer than the work.
_WORK_FOR_ONE = 1 << 15


class _Step(ctypes.Structure):
    """`struct step` of native/attention.h."""

    _fields_ = (
        ("tables", c_void_p),
        ("items", c_void_p),
        ("merges", c_void_p),
        ("partials", c_void_p),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("partial_rows", c_int64),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("query_strides", c_int64 * 2),
        ("out_stride", c_int64),
        ("num_items", c_int32),
        ("num_merges", c_int32),
        ("table_width", c_int32),
        ("block_size", c_int32),
        ("num_kv_heads", c_int32),
        ("group", c_int32),
        ("key_dim", c_int32),
        ("value_dim", c_int32),
        ("max_rows", c_int32),
        ("num_threads", c_int32),
    )


class AttentionKernels:
    """What native/attention.c exports. Made once per device."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self.attend = kernel(kernels, "attend", (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float))
        self._sizes = kernels["attention_sizes"]
        self._sizes.argtypes, self._sizes.restype = (c_int32, c_int32, c_int32, c_void_p, c_void_p), None

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether they were made for it."""
        return dtype in self.attend

    def sizes(self, max_rows: int, key_dim: int, value_dim: int) -> tuple[int, int]:
        """(bytes of scratch memory per thread, floats of a row of partial results)."""
        scratch_bytes, partial_floats = c_int64(), c_int64()
        self._sizes(max_rows, key_dim, value_dim, ctypes.byref(scratch_bytes), ctypes.byref(partial_floats))
        return scratch_bytes.value, partial_floats.value


class _Over:
    """Attention of some rows over the keys and values of their sequences, the same way in every layer.

    Keys and values lie in blocks [num_blocks, num_kv_heads, block_size, dim] that may differ in dim, the last axis dense; a sequence's
    values may be the first value_dim elements of its keys. All memory that layers share, the output included, lives as long as this
    object: a layer's result is overwritten by the next call.
    """

    def __init__(
        self, kernels: AttentionKernels, contexts: Contexts, keys: torch.Tensor, values: torch.Tensor, num_heads: int, value_dim: int
    ) -> None:
        _, num_kv_heads, block_size, key_dim = keys.shape
        assert keys.stride(3) == values.stride(3) == 1 and keys.dtype == values.dtype
        self._attend = kernels.attend[keys.dtype]
        self._cut = cut = units(contexts, num_heads // num_kv_heads)
        # One or all: between teams of other sizes OpenMP ends threads and starts new ones.
        num_threads = torch.get_num_threads() if cut.work * num_kv_heads > _WORK_FOR_ONE else 1
        scratch_bytes, partial_floats = kernels.sizes(cut.max_rows, key_dim, value_dim)
        self._tables = np.ascontiguousarray(contexts.tables, np.int32)
        self._scratch = torch.empty(num_threads * scratch_bytes, dtype=torch.uint8)
        self._partials = torch.empty(num_kv_heads * cut.partial_rows * partial_floats)
        self._out = keys.new_empty(int(contexts.lens.sum()), num_heads * value_dim)
        self._step = _Step(
            tables=_address(self._tables), items=_address(cut.items), merges=_address(cut.merges), partials=self._partials.data_ptr(),
            scratch=self._scratch.data_ptr(), scratch_bytes=scratch_bytes, partial_rows=cut.partial_rows,
            key_strides=keys.stride()[:3], value_strides=values.stride()[:3], out_stride=num_heads * value_dim,
            num_items=len(cut.items), num_merges=len(cut.merges), table_width=self._tables.shape[1], block_size=block_size,
            num_kv_heads=num_kv_heads, group=num_heads // num_kv_heads, key_dim=key_dim, value_dim=value_dim, max_rows=cut.max_rows,
            num_threads=num_threads,
        )  # fmt: skip
        self._address = ctypes.addressof(self._step)

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """queries [T, num_heads, key_dim], keys and values of a layer -> [T, num_heads * value_dim]."""
        assert queries.stride(2) == 1 and len(queries) == len(self._out)
        self._step.query_strides[:] = queries.stride()[:2]
        self._attend(self._address, queries.data_ptr(), keys.data_ptr(), values.data_ptr(), self._out.data_ptr(), scale)
        return self._out


class NativeAttention:
    """Implements cpu_attention.OverBlocks for what the kernels take. A step has layers of one kind, so one of each is kept."""

    def __init__(self, kernels: AttentionKernels, contexts: Contexts, like: LayerCache) -> None:
        assert kernels.takes(like.parts[0].dtype)
        self._kernels, self._contexts, self._like = kernels, contexts, like
        self._over: _Over | None = None
        self._latent: _Latent | None = None

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        if not len(queries):
            return queries.flatten(1)
        if self._over is None:
            keys, values = self._like.parts
            self._over = _Over(self._kernels, self._contexts, keys, values, queries.shape[1], values.shape[3])
        keys, values = cache.parts
        return self._over(queries, keys, values, scale)

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        if not len(queries):
            return queries.new_empty(0, value_up.shape[0] * value_up.shape[1])
        if self._latent is None:
            dims = LatentDims(key_up.shape[2], key_up.shape[1], queries.shape[2] - key_up.shape[1], value_up.shape[1])
            self._latent = _Latent(self._kernels, self._contexts, self._like, dims, len(key_up))
        return self._latent(queries, key_up, value_up, cache, scale)


class _Latent:
    """Latent attention of a step: decode rows and short chunks absorbed, by kernels; long chunks expanded, by torch."""

    def __init__(self, kernels: AttentionKernels, contexts: Contexts, like: LayerCache, dims: LatentDims, num_heads: int) -> None:
        pairs = zip(contexts.lens.tolist(), contexts.context_lens.tolist(), strict=True)
        absorbs = np.array([dims.absorbs(*pair) for pair in pairs])
        narrow, wide = contexts[np.flatnonzero(absorbs)], contexts[np.flatnonzero(~absorbs)]
        (rows,) = like.parts
        self._over = _Over(kernels, narrow, rows, rows, num_heads, dims.latent) if len(narrow.lens) else None
        self._wide = GatheredAttention(wide, like) if len(wide.lens) else None
        self._is_narrow = torch.from_numpy(np.repeat(absorbs, contexts.lens))  # [T]

    def __call__(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        if self._wide is None:
            return self._absorbed(queries, key_up, value_up, cache, scale)
        out = queries.new_empty(len(queries), value_up.shape[0] * value_up.shape[1])
        out[~self._is_narrow] = self._wide.attend_latent(queries[~self._is_narrow], key_up, value_up, cache, scale)
        if self._over is not None:
            out[self._is_narrow] = self._absorbed(queries[self._is_narrow], key_up, value_up, cache, scale)
        return out

    def _absorbed(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        """Attention happens in the latent space with one KV head, whose values are the keys themselves but for the rotated part."""
        assert self._over is not None
        nope, latent = key_up.shape[1:]
        narrow = torch.bmm(queries[..., :nope].transpose(0, 1), key_up).transpose(0, 1)
        inner = torch.cat((narrow, queries[..., nope:]), dim=-1)
        seen = self._over(inner, cache.parts[0], cache.parts[0], scale).view(len(queries), -1, latent).transpose(0, 1)
        return torch.bmm(seen, value_up.transpose(1, 2)).transpose(0, 1).flatten(1)


def _address(array: Int32) -> int:
    return torch.from_numpy(array).data_ptr() if array.size else 0  # half of what array.ctypes takes
