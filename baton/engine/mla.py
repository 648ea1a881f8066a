"""Multi-head latent attention (DeepSeek-V2 and V3). Knows the device seam and the sharded projections.

Heads are split over the tensor-parallel group; the latent, the rotated key and what makes them are the same on all its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton.engine.devices import LatentNorm, LayerCache
from baton.engine.norm import RMSNorm
from baton.engine.projections import ColumnParallel, Part, Replicated, RowParallel, columns_of
from baton.engine.setting import Setting, Step, Wanted
from baton.engine.spec import MlaSpec
from baton.engine.weights import Piece


class Mla:
    """Latent attention over blocks; see MlaSpec for the widths.

    kv_b_proj is kept as key_up [heads, nope, latent] and value_up [heads, value, latent] of this rank's heads, in the model's dtype
    even if other weights are quantized: devices fold it into queries and results.
    """

    def __init__(self, setting: Setting) -> None:
        spec = setting.spec
        assert spec.mla is not None
        self._mla, self._scale, self._interleaved = spec.mla, spec.softmax_scale, spec.rope.interleaved
        self._heads, self._total_heads = setting.placement.heads(spec.heads), spec.heads
        self._queries = _queries(setting, spec.mla)
        self._compress = Replicated(setting, spec.hidden, spec.mla.latent + spec.mla.rope, spec.qkv_bias)
        self._norm = RMSNorm(setting, spec.mla.latent, spec.mla.norm_eps)
        self._latent_norm = LatentNorm(self._norm.weight, spec.mla.norm_eps)
        self.key_up = setting.empty(len(self._heads), spec.mla.nope, spec.mla.latent)
        self.value_up = setting.empty(len(self._heads), spec.mla.value, spec.mla.latent)
        width = spec.heads * spec.mla.value
        self._out = RowParallel(setting, columns_of(self._heads, spec.mla.value), width, spec.hidden, spec.output_bias)

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache, wanted: Wanted | None = None) -> torch.Tensor:
        """x [T, H] -> [T, H], or of the wanted rows [N, H]; writes the step's latents and rotated keys into the cache first."""
        queries = self._queries(x).view(len(x), len(self._heads), self._mla.nope + self._mla.rope)
        queries = step.attention.enter_latent(queries, self._compress(x), self._latent_norm, step.cos, step.sin, self._interleaved, cache)
        attention = step.attention
        if wanted is not None:
            queries, attention = queries[wanted.rows], wanted.attention
        return self._out(attention.attend_latent(queries, self.key_up, self.value_up, cache, self._scale))

    def prepare(self) -> None:
        """Once, after loading; what is folded into queries and results stays as it is."""
        self._queries.prepare()
        self._compress.prepare()
        self._out.prepare()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.self_attn."""
        yield from self._queries.pieces(prefix)
        yield from self._compress.pieces(f"{prefix}.kv_a_proj_with_mqa")
        yield from self._norm.pieces(f"{prefix}.kv_a_layernorm")
        yield from self._up_pieces(f"{prefix}.kv_b_proj.weight")
        yield from self._out.pieces(f"{prefix}.o_proj")

    def _up_pieces(self, name: str) -> Iterator[Piece]:
        """The tensor has, head by head, `nope` rows for keys and `value` rows for values."""
        nope, each = self._mla.nope, self._mla.nope + self._mla.value
        shape = self._total_heads * each, self._mla.latent
        for head, key_up, value_up in zip(self._heads, self.key_up, self.value_up, strict=True):
            for target, start, stop in ((key_up, 0, nope), (value_up, nope, each)):
                yield Piece(name, shape, (slice(head * each + start, head * each + stop), slice(None)), target)


class _CompressedQueries:
    """x [T, H] -> [T, this rank's heads * (nope + rope)], by way of a normalised query of query_rank widths."""

    def __init__(self, setting: Setting, mla: MlaSpec, rank: int) -> None:
        self._compress = Replicated(setting, setting.spec.hidden, rank, setting.spec.qkv_bias)
        self._norm = RMSNorm(setting, rank, mla.norm_eps)
        self._project = _per_head(setting, "q_b_proj", rank, mla)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._project(self._norm(self._compress(x)))

    def prepare(self) -> None:
        self._compress.prepare()
        self._project.prepare()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        yield from self._compress.pieces(f"{prefix}.q_a_proj")
        yield from self._norm.pieces(f"{prefix}.q_a_layernorm")
        yield from self._project.pieces(prefix)


def _queries(setting: Setting, mla: MlaSpec) -> ColumnParallel | _CompressedQueries:
    if mla.query_rank is not None:
        return _CompressedQueries(setting, mla, mla.query_rank)
    return _per_head(setting, "q_proj", setting.spec.hidden, mla)


def _per_head(setting: Setting, name: str, in_width: int, mla: MlaSpec) -> ColumnParallel:
    heads, width = setting.placement.heads(setting.spec.heads), mla.nope + mla.rope
    return ColumnParallel(setting, in_width, [Part(name, columns_of(heads, width), setting.spec.heads * width)], bias=False)
