"""The cpu device in plain torch: the oracle that other devices are compared with. Exact in float32.

Blocks of a sequence are gathered by `torch.cat` of views, one memmove per head and block: torch's indexing is an order slower.
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
from baton.engine.devices import Collectives, LayerCache

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    def block_attention(self, batch: Batch, block_size: int) -> CpuBlockAttention:
        return CpuBlockAttention(batch, block_size)

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        local = ids - first_id
        mine = (local >= 0) & (local < len(table))
        if bool(mine.all()):
            return functional.embedding(local, table)
        rows = torch.zeros((len(ids), table.shape[1]), dtype=table.dtype)
        rows[mine] = table[local[mine]]
        return rows

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def route(self, logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
        if normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), ids

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        flat, order = ids.reshape(-1).sort(stable=True)
        bounds = torch.searchsorted(flat, torch.arange(len(gate_up) + 1)).tolist()
        tokens, weights = order // ids.shape[1], weights.reshape(-1, 1)[order]
        out = torch.zeros_like(x)
        for expert, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                rows = tokens[start:stop]
                inner = self.silu_mul(functional.linear(x[rows], gate_up[expert]))
                out.index_add_(0, rows, functional.linear(inner, down[expert]) * weights[start:stop])
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One sequence's share of a step: rows start … stop of the batch, its blocks, and how many tokens they hold afterwards.

    mask: None where all keys are visible or the pattern is plainly causal.
    """

    start: int
    stop: int
    block_ids: list[int]
    context_len: int
    mask: torch.Tensor | None

    @property
    def causal(self) -> bool:
        """Whether the chunk is the whole context: no cached prefix."""
        return self.stop - self.start == self.context_len


class CpuBlockAttention:
    """Implements baton.engine.devices.BlockAttention: one fused attention call per sequence."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        starts = batch.query_starts
        lens = starts[1:] - starts[:-1]
        owner = np.repeat(np.arange(batch.num_sequences), lens)
        blocks = batch.block_tables[owner, batch.positions // block_size] if batch.num_tokens else batch.positions
        self._blocks = torch.from_numpy(blocks.astype(np.int64))
        self._offsets = torch.from_numpy((batch.positions % block_size).astype(np.int64))
        self._parts = [_part(batch, block_size, sequence) for sequence in range(batch.num_sequences)]

    def write(self, keys: torch.Tensor, values: torch.Tensor, cache: LayerCache) -> None:
        cache.kv[self._blocks, :, :, self._offsets] = torch.stack((keys, values), dim=1)

    def attend(self, queries: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        num_tokens, num_heads, dim = queries.shape
        out = torch.empty((num_tokens, num_heads * dim), dtype=queries.dtype)
        for part in self._parts:
            out[part.start : part.stop] = _attend(queries[part.start : part.stop], cache.kv, part)
        return out


def _part(batch: Batch, block_size: int, sequence: int) -> _Part:
    start, stop = (int(batch.query_starts[sequence + i]) for i in range(2))
    context_len = int(batch.context_lens[sequence])
    num_blocks = -(-context_len // block_size)
    mask = None
    if 1 < stop - start < context_len:
        last_visible = torch.from_numpy(batch.positions[start:stop].astype(np.int64))
        mask = torch.arange(context_len) <= last_visible[:, None]
    return _Part(start, stop, batch.block_tables[sequence, :num_blocks].tolist(), context_len, mask)


def _attend(queries: torch.Tensor, kv: torch.Tensor, part: _Part) -> torch.Tensor:
    """queries [n, num_heads, D], kv [num_blocks, 2, num_kv_heads, block_size, D] -> [n, num_heads * D].

    The query heads of one KV head form the second axis of a call whose batch axis is the KV heads, so no KV is repeated; for a
    single token they form the query axis, since all of them see the same keys.
    """
    num_tokens, num_heads, dim = queries.shape
    num_kv_heads = kv.shape[2]
    keys, values = torch.cat([kv[block] for block in part.block_ids], dim=2)[:, :, : part.context_len]
    if num_tokens == 1:
        grouped = queries.view(1, num_kv_heads, num_heads // num_kv_heads, dim)
        return functional.scaled_dot_product_attention(grouped, keys[None], values[None]).reshape(1, num_heads * dim)
    grouped = queries.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, dim).permute(1, 2, 0, 3)
    shape = (*grouped.shape[:2], part.context_len, dim)
    out = functional.scaled_dot_product_attention(
        grouped, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=part.mask, is_causal=part.causal
    )
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads * dim)
