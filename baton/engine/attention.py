"""Grouped-query attention over blocks. Knows the device seam and the sharded projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton.engine.devices import LayerCache
from baton.engine.norm import RMSNorm
from baton.engine.projections import ColumnParallel, Part, RowParallel, columns_of
from baton.engine.setting import Setting, Step
from baton.engine.weights import Piece


class Attention:
    """Grouped-query attention over blocks, heads split over the group."""

    def __init__(self, setting: Setting) -> None:
        spec, placement, self._device = setting.spec, setting.placement, setting.device
        heads, kv_heads = placement.heads(spec.heads), placement.kv_heads(spec.kv_heads)
        self._scale = spec.softmax_scale
        self._dim, self._num_heads, self._num_kv_heads = spec.head_dim, len(heads), len(kv_heads)
        columns, kv_columns = columns_of(heads, spec.head_dim), columns_of(kv_heads, spec.head_dim)
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [Part("q_proj", columns, width), Part("k_proj", kv_columns, kv_width), Part("v_proj", kv_columns, kv_width)]
        self._qkv = ColumnParallel(setting, spec.hidden, parts, spec.qkv_bias)
        self._out = RowParallel(setting, columns, width, spec.hidden, spec.output_bias)
        self._norms = (RMSNorm(setting, spec.head_dim), RMSNorm(setting, spec.head_dim)) if spec.qk_norm else None

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """x [T, H] -> [T, H]; writes the step's keys and values into the cache first."""
        heads = self._qkv(x).view(len(x), self._num_heads + 2 * self._num_kv_heads, self._dim)
        queries, keys, values = torch.split(heads, [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if self._norms is not None:
            queries, keys = self._norms[0](queries), self._norms[1](keys)
        queries, keys = (self._device.rotate(part, step.cos, step.sin) for part in (queries, keys))
        step.attention.write((keys, values), cache)
        return self._out(step.attention.attend(queries, cache, self._scale))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.self_attn."""
        yield from self._qkv.pieces(prefix)
        yield from self._out.pieces(f"{prefix}.o_proj")
        if self._norms is not None:
            yield from self._norms[0].pieces(f"{prefix}.q_norm")
            yield from self._norms[1].pieces(f"{prefix}.k_norm")
