"""Attention by its definition, and steps over blocks that lie anywhere: what tests of attention have in common."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row
from baton.engine.devices import BlockAttention, Device, LayerCache
from baton.engine.devices.cpu_plan import LatentDims

Lens = list[tuple[int, int]]  # (cached tokens, new tokens) of each sequence

DTYPES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}  # relative and absolute error
# As DeepSeek has it; a narrow latent; values wider than keys.
latent_dims = st.sampled_from([LatentDims(24, 16, 8, 12), LatentDims(8, 16, 4, 16), LatentDims(16, 4, 4, 24)])


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, Lens]:
    """(block size, lens)."""
    lens = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=4))
    return draw(st.sampled_from([1, 3, 8])), lens


def scattered(device: Device, block_size: int, lens: Lens, of_sequences: Sequence[torch.Tensor]) -> tuple[BlockAttention, LayerCache]:
    """A step over sequences [parts, tokens, heads, D] in blocks in any order, beside other layers' and unused slots full of NaN."""
    num_parts, _, num_heads, dim = of_sequences[0].shape
    counts = [-(-sum(pair) // block_size) for pair in lens]
    free = torch.randperm(sum(counts) + 2).tolist()
    shape = len(free), 3, num_parts, num_heads, block_size, dim
    cache = LayerCache(torch.full(shape, torch.nan, dtype=of_sequences[0].dtype)[:, 1].unbind(1))
    rows = [Row([0] * new, cached, [free.pop() for _ in range(count)]) for (cached, new), count in zip(lens, counts, strict=True)]
    for row, of_sequence in zip(rows, of_sequences, strict=True):
        if row.start:
            earlier = Batch.build([Row([0] * row.start, 0, row.block_ids)])
            device.block_attention(earlier, cache).write(of_sequence[:, : row.start].unbind(), cache)
    step = device.block_attention(Batch.build(rows), cache)
    step.write(torch.cat([whole[:, row.start :] for row, whole in zip(rows, of_sequences, strict=True)], dim=1).unbind(), cache)
    return step, cache


def plain_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """All scores at once, in float64: queries [n, heads, D], keys and values [c, KV heads, D] -> [n, heads, D]."""
    keys, values = (part.double().repeat_interleave(queries.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    hidden = torch.ones(len(queries), len(keys), dtype=torch.bool).triu(len(keys) - len(queries) + 1)
    scores = torch.einsum("qhd,khd->hqk", queries.double() * scale, keys).masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(queries.dtype)


def plain_latent(queries: torch.Tensor, rows: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, scale: float) -> torch.Tensor:
    """By the definition: rows [c, latent + rope], the rest as in BlockAttention.attend_latent -> [n, heads, value]."""
    latents, rotated = rows.double().split([key_up.shape[2], rows.shape[1] - key_up.shape[2]], dim=1)
    keys = torch.einsum("hpl,cl->chp", key_up.double(), latents)
    keys = torch.cat((keys, rotated[:, None].expand(-1, len(key_up), -1)), dim=2)
    values = torch.einsum("hvl,cl->chv", value_up.double(), latents)
    return plain_attention(queries.double(), keys, values, scale).to(queries.dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    rtol, atol = DTYPES[want.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def projections(dims: LatentDims, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """key_up and value_up."""
    return tuple((torch.randn(heads, width, dims.latent) * dims.latent**-0.5).to(dtype) for width in (dims.nope, dims.value))
