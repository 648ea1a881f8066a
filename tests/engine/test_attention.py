"""Attention over scattered blocks equals plain attention: however a context is cut up, either way through latents, in every dtype.

By torch alone, and by the kernels of every level that this processor has; test_native_attention.py has more of those.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from baton.engine.devices import Device, native, open_device
from baton.engine.devices.cpu import CpuDevice
from baton.engine.devices.cpu_flash import attention
from baton.engine.devices.cpu_latent import absorbed, expanded
from baton.engine.devices.cpu_plan import LatentDims, segments
from baton.engine.devices.native.build import library_path
from tests.engine.over_blocks import (
    DTYPES,
    Lens,
    assert_close,
    batches,
    latent_dims,
    plain_attention,
    plain_latent,
    projections,
    scattered,
)

DEEPSEEK_V3 = LatentDims(latent=512, nope=128, rope=64, value=128)


@pytest.fixture(scope="module", params=[None, *native.fitting()], ids=lambda level: level.name if level else "torch")
def device(request: pytest.FixtureRequest) -> Device:
    """Torch alone, then with the kernels of each level."""
    if request.param is None:
        return CpuDevice()
    path = library_path(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    return CpuDevice(native.opened(path))


@given(batches(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.sampled_from(list(DTYPES)), st.integers(0, 1 << 16))
def test_over_blocks(device: Device, case: tuple[int, Lens], heads: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    (block_size, lens), (num_heads, num_kv_heads) = case, heads
    torch.manual_seed(seed)
    kv = [torch.randn(2, sum(pair), num_kv_heads, 8).to(dtype) for pair in lens]
    queries = [torch.randn(new, num_heads, 8).to(dtype) for _, new in lens]
    step, cache = scattered(device, block_size, lens, kv)
    want = [plain_attention(of_one, *pair, 0.3) for of_one, pair in zip(queries, kv, strict=True)]
    assert_close(step.attend(torch.cat(queries), cache, 0.3), torch.cat(want).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_contexts_longer_than_a_segment(device: Device, dtype: torch.dtype) -> None:
    """Chunks and single tokens together. 4 MiB of these keys and values are 512 tokens in float32, 1,024 in bfloat16."""
    torch.manual_seed(0)
    lens = [(2500, 1), (30, 1), (1100, 5), (0, 7), (600, 40)]
    kv = [torch.randn(2, sum(pair), 8, 128).to(dtype) for pair in lens]
    queries = [torch.randn(new, 16, 128).to(dtype) for _, new in lens]
    step, cache = scattered(device, 16, lens, kv)
    want = [plain_attention(of_one, *pair, 128**-0.5) for of_one, pair in zip(queries, kv, strict=True)]
    assert_close(step.attend(torch.cat(queries), cache, 128**-0.5), torch.cat(want).flatten(1))


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 70), st.integers(0, 1 << 16))
def test_the_length_of_segments_changes_nothing(cached: int, new: int, longest: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys, values = torch.randn(2, cached + new, 2, 8).unbind()
    queries = torch.randn(new, 4, 8)
    cut = segments(new, cached + new, longest)
    runs = [([part[run.start : run.stop].transpose(0, 1)[None] for part in (keys, values)], run.causal) for run in cut]
    assert_close(attention(queries, 2, runs, 2.0), plain_attention(queries, keys, values, 2.0))


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
def test_segments_cover_a_context_once(cached: int, new: int, longest: int, block_size: int) -> None:
    cut = segments(new, cached + new, longest)
    assert [token for run in cut for token in range(run.start, run.stop)] == list(range(cached + new))
    assert [run for run in cut if run.causal] == (cut[-1:] if new > 1 else [])
    assert all(0 < run.stop - run.start <= longest for run in cut if not run.causal)
    assert new == 1 or cut[-1].start == cached
    assert all(run.num_blocks(block_size) == len({token // block_size for token in range(run.start, run.stop)}) for run in cut)


@given(batches(), latent_dims, st.sampled_from(list(DTYPES)), st.integers(0, 1 << 16))
def test_latent_over_blocks(device: Device, case: tuple[int, Lens], dims: LatentDims, dtype: torch.dtype, seed: int) -> None:
    block_size, lens = case
    torch.manual_seed(seed)
    rows = [torch.randn(1, sum(pair), 1, dims.latent + dims.rope).to(dtype) for pair in lens]
    queries = [torch.randn(new, 4, dims.nope + dims.rope).to(dtype) for _, new in lens]
    up = projections(dims, 4, dtype)
    step, cache = scattered(device, block_size, lens, rows)
    want = [plain_latent(of_one, held[0, :, 0], *up, 0.2) for of_one, held in zip(queries, rows, strict=True)]
    assert_close(step.attend_latent(torch.cat(queries), *up, cache, 0.2), torch.cat(want).flatten(1))


@given(st.integers(0, 40), st.integers(1, 12), st.integers(3, 50), latent_dims, st.sampled_from(list(DTYPES)), st.integers(0, 1 << 16))
def test_both_ways_through_latents(cached: int, new: int, longest: int, dims: LatentDims, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(cached + new, dims.latent + dims.rope).to(dtype)
    queries, up = torch.randn(new, 4, dims.nope + dims.rope).to(dtype), projections(dims, 4, dtype)
    runs = [((rows[None, None, run.start : run.stop],), run.causal) for run in segments(new, cached + new, longest)]
    want = plain_latent(queries, rows, *up, 0.2)
    assert_close(absorbed([queries], [runs], *up, 0.2)[0], want)
    assert_close(expanded(queries, runs, *up, 0.2), want)


@given(st.integers(1, 400), st.integers(0, 4000), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_what_absorbs_would_absorb_with_fewer_tokens(new: int, cached: int, latent: int, nope: int, rope: int, value: int) -> None:
    dims = LatentDims(latent, nope, rope, value)
    assert dims.absorbs(1, cached + 1)
    if dims.absorbs(new, cached + new):
        assert all(dims.absorbs(fewer, cached + new) for fewer in range(1, new))


def test_deepseek_v3_absorbs_decode_rows_and_short_chunks_over_long_contexts() -> None:
    """131,072 multiply-adds to expand a token, 768 more to attend to it absorbed: the limit tends to 131,072 / 768 = 171 tokens."""
    assert not any(DEEPSEEK_V3.absorbs(length, length) for length in (2, 100, 10_000))
    assert [max(n for n in range(1, 1000) if DEEPSEEK_V3.absorbs(n, context)) for context in (100, 1000, 100_000)] == [63, 145, 170]


@given(st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(0, 1 << 16))
@settings(max_examples=20)
def test_rotation_equals_transformers(num_tokens: int, dtype: torch.dtype, interleaved: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, angles = torch.randn(num_tokens, 3, 8).to(dtype), torch.randn(num_tokens, 1, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    got = open_device("cpu").rotate(x, cos, sin, interleaved)
    theirs = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    of_heads = x.transpose(0, 1)[None]
    want, _ = theirs(of_heads, of_heads, *(part[None, :, 0].repeat(1, 1, 2) for part in (cos, sin)))
    assert torch.equal(got, want[0].transpose(0, 1))
