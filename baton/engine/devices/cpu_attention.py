"""Attention over blocks in plain torch: sequence by sequence, over segments of bounded size.

Nothing grows with the context but the time: no mask is made, and one segment of it is gathered at a time. Blocks are gathered by
`index_select`, one memmove per head and block: torch's general indexing takes five to eight times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.engine.batch import Batch, Int64
from baton.engine.devices import LayerCache
from baton.engine.devices.cpu_flash import Run, attention
from baton.engine.devices.cpu_latent import latent_attention
from baton.engine.devices.cpu_plan import Segment, segments

# What is gathered at once: it should still be in the core's cache when attention reads it, and in memory that malloc has at hand
# rather than maps and clears anew. One token over 32,768 with 8 KV heads of 128 in float32 takes 6 times as long all at once.
_SEGMENT_BYTES = 4 << 20
# But not fewer tokens: this many keys are one step inside the fused kernel, and every segment costs a call and a merge.
_MIN_SEGMENT_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A segment of one sequence's context and where it lies.

    rows: [num_parts * num_kv_heads * num_blocks], in this order, of what `_rows` makes of a layer. slots: which of theirs are meant.
    """

    rows: torch.Tensor
    slots: slice
    causal: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    """Everything a sequence has in the cache after a step's writes."""

    context_len: int
    held: tuple[_Held, ...]


class CpuBlockAttention:
    """Implements baton.engine.devices.BlockAttention."""

    def __init__(self, batch: Batch, like: LayerCache) -> None:
        num_kv_heads, block_size, dim = like.parts[0].shape[1:]
        lens = np.diff(batch.query_starts)
        owner = np.repeat(np.arange(batch.num_sequences), lens)
        blocks = batch.block_tables[owner, batch.positions // block_size] if batch.num_tokens else batch.positions
        self._blocks = torch.from_numpy(blocks.astype(np.int64))
        self._offsets = torch.from_numpy((batch.positions % block_size).astype(np.int64))
        self._lens: list[int] = lens.tolist()
        self._shape = len(like.parts), 1, num_kv_heads, -1, dim
        of_sequences = zip(self._lens, batch.context_lens.tolist(), batch.block_tables.astype(np.int64), strict=True)
        self._sequences = [_sequence(*of_sequence, like) for of_sequence in of_sequences]

    def write(self, parts: Sequence[torch.Tensor], cache: LayerCache) -> None:
        for part, kept in zip(parts, cache.parts, strict=True):
            kept[self._blocks, :, self._offsets] = part

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        if not self._sequences:
            return queries.flatten(1)
        rows, num_kv_heads = _rows(cache), self._shape[2]
        of_sequences = zip(torch.split(queries, self._lens), self._sequences, strict=True)
        outs = [attention(of_one, num_kv_heads, self._gathered(sequence, rows), scale) for of_one, sequence in of_sequences]
        return torch.cat(outs).flatten(1)

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        if not self._sequences:
            return queries.new_empty(0, value_up.shape[0] * value_up.shape[1])
        rows = _rows(cache)
        contexts = [self._gathered(sequence, rows) for sequence in self._sequences]
        context_lens = [sequence.context_len for sequence in self._sequences]
        return latent_attention(torch.split(queries, self._lens), contexts, context_lens, key_up, value_up, scale).flatten(1)

    def _gathered(self, sequence: _Sequence, rows: torch.Tensor) -> Iterator[Run]:
        """Segment by segment: each part [1, num_kv_heads, tokens, D], and whether it is causal."""
        for held in sequence.held:
            yield rows.index_select(0, held.rows).view(self._shape)[:, :, :, held.slots].unbind(), held.causal


def _rows(cache: LayerCache) -> torch.Tensor:
    """The layer as rows of one head of one block, [n, block_size * D]; between its blocks lie the rows of other layers."""
    first = cache.parts[0]
    num_blocks, num_heads, block_size, dim = first.shape
    width = block_size * dim
    num_rows = (num_blocks - 1) * (first.stride(0) // width) + len(cache.parts) * num_heads
    return first.as_strided((num_rows, width), (width, 1))


def _sequence(num_tokens: int, context_len: int, blocks: Int64, like: LayerCache) -> _Sequence:
    first = like.parts[0]
    token_bytes = len(like.parts) * first.shape[1] * first.shape[3] * first.element_size()
    longest = max(_MIN_SEGMENT_TOKENS, _SEGMENT_BYTES // token_bytes)
    return _Sequence(context_len, tuple(_held(segment, blocks, like) for segment in segments(num_tokens, context_len, longest)))


def _held(segment: Segment, blocks: Int64, like: LayerCache) -> _Held:
    _, num_kv_heads, block_size, dim = like.parts[0].shape
    first = segment.start // block_size
    within = blocks[first : -(-segment.stop // block_size)]
    rows = np.arange(len(like.parts) * num_kv_heads)[:, None] + within * (like.parts[0].stride(0) // (block_size * dim))
    start = segment.start - first * block_size
    return _Held(torch.from_numpy(rows.reshape(-1)), slice(start, start + segment.stop - segment.start), segment.causal)
