"""Choosing experts and computing them, in plain torch. Functions behind CpuDevice; see baton.engine.devices.Device for shapes."""

from __future__ import annotations

from itertools import pairwise

import torch

from baton.engine.devices import Matrix
from baton.engine.devices.cpu_linear import linear, silu_mul
from baton.engine.spec import GateSpec

_NO_SUM = 1e-20  # as in transformers: keeps a sum of sigmoids that are all 0 from dividing; too small to change any other


def route(logits: torch.Tensor, gate: GateSpec, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See Device.route. Formulas: DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 2.1.2), in transformers' order of operations."""
    scores = logits.float().sigmoid() if gate.scoring == "sigmoid" else logits.softmax(dim=-1, dtype=torch.float32)
    wanted = scores if bias is None else scores + bias
    if gate.top_groups < gate.num_groups:
        wanted = _in_best_groups(wanted, gate)
    # Sorted or not as transformers does it, so that the sum below adds up in the same order.
    best, ids = torch.topk(wanted, gate.top_k, dim=-1, sorted=gate.scoring == "softmax")
    weights = best if bias is None else scores.gather(1, ids)
    if gate.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _NO_SUM)
    return (weights if gate.scale == 1.0 else weights * gate.scale), ids


def _in_best_groups(wanted: torch.Tensor, gate: GateSpec) -> torch.Tensor:
    """wanted [T, num_experts], -inf outside of each token's best groups.

    Never 0, which is more than a score with a negative bias: such an expert would lose to those that are out of the question.
    """
    grouped = wanted.view(len(wanted), gate.num_groups, wanted.shape[1] // gate.num_groups)
    counted = grouped.topk(2, dim=-1).values.sum(-1) if gate.group_score == "top2" else grouped.amax(-1)
    best = torch.topk(counted, gate.top_groups, dim=-1, sorted=False).indices
    outside = torch.ones_like(counted, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(outside[:, :, None], float("-inf")).flatten(1)


def experts(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
    """See Device.experts."""
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
    inner = silu_mul(torch.cat([linear(rows[start:stop], gate_up[expert]) for expert, start, stop in runs]))
    outs = torch.cat([linear(inner[start:stop], down[expert]) for expert, start, stop in runs])
    parts = x.new_zeros((num_tokens * top_k, x.shape[1]))
    parts[mine] = (outs * weights.gather(1, by_id).view(-1, 1)[mine]).to(x.dtype)
    return _added_up(parts.view(num_tokens, top_k, -1))


def _added_up(parts: torch.Tensor) -> torch.Tensor:
    """[T, k, H] -> [T, H], one after the other: `sum` would round once, transformers rounds after each expert."""
    total = torch.zeros_like(parts[:, 0])
    for part in parts.unbind(1):
        total += part
    return total
