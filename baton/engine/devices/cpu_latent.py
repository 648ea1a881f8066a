"""The two ways through latent attention: https://arxiv.org/abs/2405.04434, section 2.1.2. Knows no blocks; cpu_plan.py chooses.

A context is runs of ((rows,), causal): rows [1, 1, tokens, latent + rope], a latent beside a rotated key. n: tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional

from baton.engine.devices.cpu_flash import Run, attention
from baton.engine.devices.cpu_plan import LatentDims

Context = Iterable[Run]


def latent_attention(
    queries: Sequence[torch.Tensor],
    contexts: Sequence[Context],
    context_lens: Sequence[int],
    key_up: torch.Tensor,
    value_up: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Queries [n, num_heads, nope + rope] of several sequences, each the cheaper way -> [all tokens, num_heads, value]."""
    dims = LatentDims(key_up.shape[2], key_up.shape[1], queries[0].shape[2] - key_up.shape[1], value_up.shape[1])
    narrow = [i for i, of_one in enumerate(queries) if dims.absorbs(len(of_one), context_lens[i])]
    outs: dict[int, torch.Tensor] = {}
    if narrow:
        of_narrow = absorbed([queries[i] for i in narrow], [contexts[i] for i in narrow], key_up, value_up, scale)
        outs.update(zip(narrow, of_narrow, strict=True))
    for i in set(range(len(queries))).difference(narrow):
        outs[i] = expanded(queries[i], contexts[i], key_up, value_up, scale)
    return torch.cat([outs[i] for i in range(len(queries))])


def absorbed(
    queries: Sequence[torch.Tensor], contexts: Sequence[Context], key_up: torch.Tensor, value_up: torch.Tensor, scale: float
) -> Sequence[torch.Tensor]:
    """Queries [n, num_heads, nope + rope] of several sequences -> [n, num_heads, value] of each.

    Attention happens in the latent space with one KV head, whose values are the keys themselves but for the rotated part. The
    up-projections are read once for all sequences: with few tokens each, reading them is what costs.
    """
    nope, latent = key_up.shape[1:]
    narrow = torch.bmm(torch.cat([of_one[..., :nope] for of_one in queries]).transpose(0, 1), key_up).transpose(0, 1)
    inner = torch.cat((narrow, torch.cat([of_one[..., nope:] for of_one in queries])), dim=-1)
    lens = [len(of_one) for of_one in queries]
    of_sequences = zip(torch.split(inner, lens), contexts, strict=True)
    outs = [attention(part, 1, (((rows, rows), causal) for (rows,), causal in context), scale) for part, context in of_sequences]
    seen = torch.cat(outs)[..., :latent].transpose(0, 1)
    return torch.split(torch.bmm(seen, value_up.transpose(1, 2)).transpose(0, 1), lens)


def expanded(queries: torch.Tensor, context: Context, key_up: torch.Tensor, value_up: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries [n, num_heads, nope + rope] -> [n, num_heads, value], over keys and values made of one run's latents at a time."""
    width, value = max(queries.shape[2], value_up.shape[1]), value_up.shape[1]
    runs = ((_expanded(rows, key_up, value_up, width), causal) for (rows,), causal in context)
    return attention(_widened(queries, width), len(key_up), runs, scale)[..., :value]


def _expanded(rows: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, num_heads, tokens, width] of a run's rows, filled up with zeros: the kernel wants them alike."""
    latent = key_up.shape[2]
    latents, rotated = rows[..., :latent], rows[..., latent:].expand(-1, len(key_up), -1, -1)
    keys = torch.cat((torch.matmul(latents, key_up.transpose(1, 2)), rotated), dim=-1)
    return _widened(keys, width), _widened(torch.matmul(latents, value_up.transpose(1, 2)), width)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
