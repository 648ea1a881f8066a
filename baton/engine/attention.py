"""Grouped-query attention over blocks. Knows the device seam and the sharded projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton.engine.devices import HeadNorms, LayerCache
from baton.engine.norm import RMSNorm
from baton.engine.projections import ColumnParallel, Part, RowParallel, columns_of
from baton.engine.setting import Setting, Step, Wanted
from baton.engine.weights import Piece


class Attention:
    """Grouped-query attention over blocks, heads split over the group."""

    def __init__(self, setting: Setting) -> None:
        spec, placement = setting.spec, setting.placement
        heads, kv_heads = placement.heads(spec.heads), placement.kv_heads(spec.kv_heads)
        self._scale = spec.softmax_scale
        columns, kv_columns = columns_of(heads, spec.head_dim), columns_of(kv_heads, spec.head_dim)
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [Part("q_proj", columns, width), Part("k_proj", kv_columns, kv_width), Part("v_proj", kv_columns, kv_width)]
        self._qkv = ColumnParallel(setting, spec.hidden, parts, spec.qkv_bias)
        self._out = RowParallel(setting, columns, width, spec.hidden, spec.output_bias)
        self._norms = (RMSNorm(setting, spec.head_dim), RMSNorm(setting, spec.head_dim)) if spec.qk_norm else None
        self._head_norms = HeadNorms(self._norms[0].weight, self._norms[1].weight, spec.norm_eps) if self._norms else None

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache, wanted: Wanted | None = None) -> torch.Tensor:
        """x [T, H] -> [T, H], or of the wanted rows [N, H]; writes the step's keys and values into the cache first."""
        queries, attention = step.attention.enter(self._qkv(x), self._head_norms, step.cos, step.sin, cache), step.attention
        if wanted is not None:
            queries, attention = queries[wanted.rows], wanted.attention
        return self._out(attention.attend(queries, cache, self._scale))

    def prepare(self) -> None:
        """Once, after loading."""
        self._qkv.prepare()
        self._out.prepare()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.self_attn."""
        yield from self._qkv.pieces(prefix)
        yield from self._out.pieces(f"{prefix}.o_proj")
        if self._norms is not None:
            yield from self._norms[0].pieces(f"{prefix}.q_norm")
            yield from self._norms[1].pieces(f"{prefix}.k_norm")
