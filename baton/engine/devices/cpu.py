"""The cpu device in plain torch: the oracle that other devices are compared with. Exact in float32.

Blocks of a sequence are gathered by `embedding`, one memmove per head and block: torch's general indexing is an order slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import ProcessGroupGloo, Store
from torch.nn import functional

from baton.engine.batch import Batch
from baton.engine.devices import Collectives, LayerCache, Matrix
from baton.engine.spec import GateSpec

_DTYPES = {"int8": torch.int8, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuDevice:
    """Implements baton.engine.devices.Device; see there for shapes."""

    name = "cpu"

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=_DTYPES[dtype])

    def tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array.copy())

    def collectives(self, store: Store, rank: int, size: int, bind: str, timeout_s: float) -> Collectives:
        """A gloo group of its own, not one of torch.distributed's global ones: these can only bind by environment variable."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=bind)]
        options._timeout = timedelta(seconds=timeout_s)
        return cast(Collectives, ProcessGroupGloo(store, rank, size, options))

    def block_attention(self, batch: Batch, like: LayerCache) -> CpuBlockAttention:
        return CpuBlockAttention(batch, like)

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        local = ids - first_id
        mine = (local >= 0) & (local < len(table))
        if bool(mine.all()):
            return functional.embedding(local, table)
        rows = torch.zeros((len(ids), table.shape[1]), dtype=table.dtype)
        rows[mine] = table[local[mine]]
        return rows

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert weight.scales is None
        return functional.linear(x, weight.values, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def route(self, logits: torch.Tensor, gate: GateSpec, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), gate.top_k, dim=-1)
        if gate.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
        num_tokens, top_k = ids.shape
        ids, by_id = ids.sort(dim=1)
        flat, order = ids.reshape(-1).sort(stable=True)
        first, *bounds = torch.searchsorted(flat, torch.arange(len(gate_up) + 1)).tolist()
        mine = order[first : bounds[-1]]
        runs = [(expert, start - first, stop - first) for expert, (start, stop) in enumerate(pairwise((first, *bounds))) if start < stop]
        if not runs:
            return torch.zeros_like(x)
        # One small operation for all experts where possible: of few tokens, each costs as much as an expert's weights.
        rows = x[mine // top_k]
        inner = self.silu_mul(torch.cat([self.linear(rows[start:stop], gate_up[expert]) for expert, start, stop in runs]))
        outs = torch.cat([self.linear(inner[start:stop], down[expert]) for expert, start, stop in runs])
        parts = x.new_zeros((num_tokens * top_k, x.shape[1]))
        parts[mine] = outs * weights.gather(1, by_id).view(-1, 1)[mine]
        return _added_up(parts.view(num_tokens, top_k, -1))


def _added_up(parts: torch.Tensor) -> torch.Tensor:
    """[T, k, H] -> [T, H], one after the other: `sum` would round once, transformers rounds after each expert."""
    total = torch.zeros_like(parts[:, 0])
    for part in parts.unbind(1):
        total += part
    return total


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One sequence's share of a step: how many tokens it computes and holds afterwards, and where its keys and values are.

    pieces: [2 * num_kv_heads * num_blocks], in this order, rows of what `_pieces` makes of a layer. mask: None where all keys are
    visible or the pattern is plainly causal.
    """

    num_tokens: int
    context_len: int
    pieces: torch.Tensor
    mask: torch.Tensor | None

    @property
    def causal(self) -> bool:
        """Whether the chunk is the whole context: no cached prefix."""
        return self.num_tokens == self.context_len


class CpuBlockAttention:
    """Implements baton.engine.devices.BlockAttention: one fused attention call per sequence."""

    def __init__(self, batch: Batch, like: LayerCache) -> None:
        block_size = like.parts[0].shape[2]
        lens = np.diff(batch.query_starts)
        owner = np.repeat(np.arange(batch.num_sequences), lens)
        blocks = batch.block_tables[owner, batch.positions // block_size] if batch.num_tokens else batch.positions
        self._blocks = torch.from_numpy(blocks.astype(np.int64))
        self._offsets = torch.from_numpy((batch.positions % block_size).astype(np.int64))
        self._lens: list[int] = lens.tolist()
        self._parts = [_part(batch, like, sequence) for sequence in range(batch.num_sequences)]

    def write(self, parts: Sequence[torch.Tensor], cache: LayerCache) -> None:
        for part, kept in zip(parts, cache.parts, strict=True):
            kept[self._blocks, :, self._offsets] = part

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        raise NotImplementedError

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        if not self._parts:
            return queries.flatten(1)
        pieces, num_kv_heads = _pieces(cache), cache.parts[0].shape[1]
        of_parts = zip(torch.split(queries, self._lens), self._parts, strict=True)
        return torch.cat([_attend(of_part, pieces, num_kv_heads, part, scale) for of_part, part in of_parts])


def _pieces(cache: LayerCache) -> torch.Tensor:
    """The layer as rows of one head of one block, [n, block_size * D]; between its blocks lie the rows of other layers."""
    first = cache.parts[0]
    num_blocks, num_heads, block_size, dim = first.shape
    width = block_size * dim
    num_rows = (num_blocks - 1) * (first.stride(0) // width) + len(cache.parts) * num_heads
    return first.as_strided((num_rows, width), (width, 1))


def _part(batch: Batch, like: LayerCache, sequence: int) -> _Part:
    start, stop = (int(batch.query_starts[sequence + i]) for i in range(2))
    context_len = int(batch.context_lens[sequence])
    _, num_kv_heads, block_size, dim = like.parts[0].shape
    blocks = batch.block_tables[sequence, : -(-context_len // block_size)].astype(np.int64)
    pieces = np.arange(len(like.parts) * num_kv_heads)[:, None] + blocks * (like.parts[0].stride(0) // (block_size * dim))
    mask = None
    if 1 < stop - start < context_len:
        last_visible = torch.from_numpy(batch.positions[start:stop].astype(np.int64))
        mask = torch.arange(context_len) <= last_visible[:, None]
    return _Part(stop - start, context_len, torch.from_numpy(pieces.reshape(-1)), mask)


def _attend(queries: torch.Tensor, pieces: torch.Tensor, num_kv_heads: int, part: _Part, scale: float) -> torch.Tensor:
    """queries [n, num_heads, D], pieces [rows, block_size * D] -> [n, num_heads * D].

    The query heads of one KV head form the second axis of a call whose batch axis is the KV heads, so no KV is repeated; for a
    single token they form the query axis, since all of them see the same keys.
    """
    num_tokens, num_heads, dim = queries.shape
    gathered = functional.embedding(part.pieces, pieces).view(2, 1, num_kv_heads, -1, dim)
    keys, values = gathered[:, :, :, : part.context_len].unbind()
    if num_tokens == 1:
        grouped = queries.view(1, num_kv_heads, num_heads // num_kv_heads, dim)
        return functional.scaled_dot_product_attention(grouped, keys, values, scale=scale).view(1, num_heads * dim)
    grouped = queries.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, dim).permute(1, 2, 0, 3)
    shape = (*grouped.shape[:2], part.context_len, dim)
    out = functional.scaled_dot_product_attention(
        grouped, keys[0, :, None].expand(shape), values[0, :, None].expand(shape), attn_mask=part.mask, is_causal=part.causal, scale=scale
    )
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads * dim)
