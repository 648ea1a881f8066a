"""Attention of one sequence over runs of keys and values, one fused call per run, merged by log-sum-exp. Knows no blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

_fused = torch._scaled_dot_product_flash_attention_for_cpu

Run = tuple[Sequence[torch.Tensor], bool]
Partial = tuple[torch.Tensor, torch.Tensor]


def attention(queries: torch.Tensor, num_kv_heads: int, runs: Iterable[Run], scale: float) -> torch.Tensor:
    """queries [n, num_heads, D] over all runs, at least one, of ((keys, values), causal) -> [n, num_heads, D].

    keys, values: [1, num_kv_heads, tokens, D], the last axis dense. All queries see all of a run, or if it is causal (and then has
    n tokens) query i its tokens 0 … i. Scores and sums are float32 in any dtype. Runs are taken one at a time: make them as they go.
    """
    num_tokens, num_heads, dim = queries.shape
    one, group = num_tokens == 1, num_heads // num_kv_heads
    grouped = queries.view(1, num_kv_heads, group, dim) if one else queries.view(num_tokens, num_kv_heads, group, dim).permute(1, 2, 0, 3)
    done: Partial | None = None
    for (keys, values), causal in runs:
        part = _fused(grouped, keys, values, scale=scale) if one else _of_chunk(grouped, keys, values, causal, scale)
        done = part if done is None else _merged(done, part)
    assert done is not None, "no context"
    out = done[0] if done[0].dtype == queries.dtype else done[0].to(queries.dtype)  # `to` costs a decode row as much as a view
    return out.view(1, num_heads, dim) if one else out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, dim)


def _of_chunk(grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scale: float) -> Partial:
    """grouped [num_kv_heads, group, n, D] -> the same, and its log-sum-exp [num_kv_heads, group, n] float32.

    Where all see the same keys, all rows of a KV head form one axis of the call: with few tokens it is up to three times as fast.
    Either way no KV is repeated.
    """
    if causal:
        keys, values = keys[0, :, None].expand(grouped.shape), values[0, :, None].expand(grouped.shape)
        return _fused(grouped, keys, values, is_causal=True, scale=scale)
    out, lse = _fused(grouped.reshape(1, len(grouped), -1, grouped.shape[3]), keys, values, scale=scale)
    return out.view(grouped.shape), lse.view(grouped.shape[:3])


def _merged(first: Partial, second: Partial) -> Partial:
    """Attention over the union of two disjoint runs: results weighed by their share exp(lse) of the sum, in float32."""
    share = torch.sigmoid(second[1] - first[1])[..., None]
    return torch.lerp(first[0].float(), second[0].float(), share), torch.logaddexp(first[1], second[1])
