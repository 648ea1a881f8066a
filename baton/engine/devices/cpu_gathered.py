"""Attention over blocks in plain torch: sequence by sequence, over segments of bounded size. The reference for the kernels.

Nothing grows with the context but the time: no mask is made, and one segment of it is gathered at a time. Blocks are gathered by
`index_select`, one memmove per head and block: torch's general indexing takes five to eight times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.engine.batch import Int64
from baton.engine.devices import LayerCache
from baton.engine.devices.cpu_flash import Run, attention
from baton.engine.devices.cpu_latent import latent_attention
from baton.engine.devices.cpu_plan import Contexts, Segment, segments

# What is gathered at once, so that it is still in the core's cache when attention reads it: a token over 8,000 others, with 8 KV
# heads of 128 in float32, then takes half the time.
_SEGMENT_BYTES = 4 << 20
# But not fewer tokens: this many keys are one step inside the fused kernel, and every segment costs a call and a merge.
_MIN_SEGMENT_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A segment of one sequence's context: where it lies and where it is gathered to.

    rows: [num_parts * num_kv_heads * num_blocks], in this order, of what `_rows` makes of a layer. target: those rows in the step's
    scratch memory. parts: what is meant of them, each [1, num_kv_heads, tokens, D]; the first and the last block may hold more.
    """

    rows: torch.Tensor
    target: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    causal: bool


class GatheredAttention:
    """Implements cpu_attention.OverBlocks, for every dtype.

    All segments are gathered into one scratch memory, one after the other and layer by layer: fresh memory for each would cost more
    than attention does, where malloc has to map and clear it. It lives as long as this object, a step.
    """

    def __init__(self, contexts: Contexts, like: LayerCache) -> None:
        shape = num_parts, num_kv_heads, block_size, dim = len(like.parts), *like.parts[0].shape[1:]
        assert all(part.shape == like.parts[0].shape for part in like.parts), "_rows takes parts for heads of one size"
        self._num_kv_heads = num_kv_heads
        self._lens: list[int] = contexts.lens.tolist()
        self._context_lens: list[int] = contexts.context_lens.tolist()
        longest = max(_MIN_SEGMENT_TOKENS, _SEGMENT_BYTES // (num_parts * num_kv_heads * dim * like.parts[0].element_size()))
        cut = [segments(*of_one, longest) for of_one in zip(self._lens, self._context_lens, strict=True)]
        most_blocks = max((segment.num_blocks(block_size) for of_one in cut for segment in of_one), default=0)
        scratch = like.parts[0].new_empty(num_parts * num_kv_heads * most_blocks, block_size * dim)
        tables = contexts.tables.astype(np.int64) * (like.parts[0].stride(0) // (block_size * dim))
        self._held = [[_held(segment, table, shape, scratch) for segment in of_one] for of_one, table in zip(cut, tables, strict=True)]

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        if not self._held:
            return queries.flatten(1)
        rows = _rows(cache)
        of_sequences = zip(torch.split(queries, self._lens), self._held, strict=True)
        return torch.cat([attention(of_one, self._num_kv_heads, _gathered(held, rows), scale) for of_one, held in of_sequences]).flatten(1)

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        if not self._held:
            return queries.new_empty(0, value_up.shape[0] * value_up.shape[1])
        rows = _rows(cache)
        contexts = [_gathered(held, rows) for held in self._held]
        return latent_attention(torch.split(queries, self._lens), contexts, self._context_lens, key_up, value_up, scale).flatten(1)


def _gathered(held: Sequence[_Held], rows: torch.Tensor) -> Iterator[Run]:
    """Segment by segment, each valid until the next one is asked for, of this or another sequence."""
    for segment in held:
        torch.index_select(rows, 0, segment.rows, out=segment.target)
        yield segment.parts, segment.causal


def _rows(cache: LayerCache) -> torch.Tensor:
    """The layer as rows of one head of one block, [n, block_size * D]; between its blocks lie the rows of other layers."""
    first = cache.parts[0]
    num_blocks, num_heads, block_size, dim = first.shape
    width = block_size * dim
    num_rows = (num_blocks - 1) * (first.stride(0) // width) + len(cache.parts) * num_heads
    return first.as_strided((num_rows, width), (width, 1))


def _held(segment: Segment, table: Int64, shape: tuple[int, int, int, int], scratch: torch.Tensor) -> _Held:
    """table: the first row of each block of the sequence. shape: num_parts, num_kv_heads, block_size, D."""
    num_parts, num_kv_heads, block_size, dim = shape
    first, num_blocks = segment.start // block_size, segment.num_blocks(block_size)
    rows = np.arange(num_parts * num_kv_heads)[:, None] + table[first : first + num_blocks]
    target = scratch[: rows.size]
    whole = target.view(num_parts, 1, num_kv_heads, num_blocks * block_size, dim)
    parts = whole.narrow(3, segment.start - first * block_size, segment.stop - segment.start).unbind()
    return _Held(torch.from_numpy(rows.reshape(-1)), target, parts, segment.causal)
