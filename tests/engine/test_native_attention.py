"""Attention by kernels: as exact as its dtype allows, and a row's bits depend on its own context alone: not on what else is in the step,
on the number of threads, on how a prompt was cut into chunks, or on where its blocks lie.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import Batch
from baton.engine.devices import LayerCache, native
from baton.engine.devices.cpu import CpuDevice
from baton.engine.devices.cpu_plan import Contexts, LatentDims
from baton.engine.devices.cpu_units import MAX_ROWS, RUN_KEYS, units
from baton.engine.devices.native.build import library_path
from tests.engine.over_blocks import Lens, latent_dims, plain_attention, plain_latent, projections, scattered

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.find().how)

BOTH = [torch.float32, torch.bfloat16]
# Of what values could add up to: 1e-5, and two roundings to 8 bits: of a key's share and of the result.
UNIT = {torch.float32: 2**-17, torch.bfloat16: 2**-7}
HEADS = [(1, 1), (4, 2), (6, 2), (4, 1), (7, 1), (8, 1), (14, 2), (70, 1)]  # the last one is cut into parts
# Around the edges of tiles, runs and registers.
cached_tokens = st.one_of(st.integers(0, 20), st.sampled_from([47, 63, 64, 65, 127, 500, 511, 512, 513, 1023, 1100]))
new_tokens = st.one_of(st.just(1), st.integers(1, 9), st.sampled_from([16, 63, 64, 130]))
seeds = st.integers(0, 1 << 16)


@pytest.fixture(scope="module", params=native.fitting(), ids=lambda level: level.name)
def device(request: pytest.FixtureRequest) -> CpuDevice:
    """With the kernels of every level that this processor has and the compiler knew."""
    path = library_path(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    return CpuDevice(native.opened(path))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """As many as the operator asked."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, Lens]:
    """(block size, lens): chunks and decode rows together."""
    lens = draw(st.lists(st.tuples(cached_tokens, new_tokens), min_size=1, max_size=4))
    return draw(st.sampled_from([1, 5, 16, 64, 256])), lens


def drawn(lens: Lens, heads: tuple[int, int], dim: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[list[torch.Tensor], ...]:
    """(keys and values, queries) of each sequence."""
    kv = [torch.randn(2, sum(pair), heads[1], dim).to(dtype) for pair in lens]
    return kv, [(torch.randn(new, heads[0], dim) * spread).to(dtype) for _, new in lens]


def attended(device: CpuDevice, block_size: int, lens: Lens, kv: list[torch.Tensor], queries: list[torch.Tensor]) -> torch.Tensor:
    step, cache = scattered(device, block_size, lens, kv)
    return step.attend(torch.cat(queries), cache, queries[0].shape[2] ** -0.5).clone()


def assert_exact(got: torch.Tensor, queries: list[torch.Tensor], kv: list[torch.Tensor]) -> None:
    """Each element as near to the definition as values of this size can be added up in this dtype."""
    scale = queries[0].shape[2] ** -0.5
    wide = [(of_one.double(), *pair.double()) for of_one, pair in zip(queries, kv, strict=True)]
    want = torch.cat([plain_attention(of_one, keys, values, scale) for of_one, keys, values in wide]).flatten(1)
    most = torch.cat([plain_attention(of_one, keys, values.abs(), scale) for of_one, keys, values in wide]).flatten(1)
    assert got.dtype == queries[0].dtype
    assert bool(((got.double() - want).abs() <= UNIT[got.dtype] * most + 1e-30).all())


@given(steps(), st.sampled_from(HEADS), st.sampled_from([1, 8, 13, 32, 40, 64, 96]), st.sampled_from(BOTH), seeds)
@settings(max_examples=60)
def test_of_any_shape(device: CpuDevice, case: tuple[int, Lens], heads: tuple[int, int], dim: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    block_size, lens = case
    kv, queries = drawn(lens, heads, dim, dtype)
    assert_exact(attended(device, block_size, lens, kv, queries), queries, kv)


@given(steps(), st.sampled_from(HEADS), st.sampled_from(BOTH), seeds)
@settings(max_examples=30)
def test_companions_threads_and_blocks_change_no_bit(
    device: CpuDevice, case: tuple[int, Lens], heads: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    block_size, lens = case
    kv, queries = drawn(lens, heads, 16, dtype)
    together = attended(device, block_size, lens, kv, queries)
    for number in (2, 3):
        with threads(number):
            assert torch.equal(attended(device, block_size, lens, kv, queries), together)
    alone = [attended(device, 7, [pair], [kv[i]], [queries[i]]) for i, pair in enumerate(lens)]
    assert torch.equal(torch.cat(alone), together)


@given(st.integers(0, 1100), st.lists(st.integers(1, 140), min_size=1, max_size=4), st.sampled_from(HEADS), st.sampled_from(BOTH), seeds)
@settings(max_examples=40)
def test_how_a_prompt_is_cut_changes_no_bit(
    device: CpuDevice, cached: int, chunks: list[int], heads: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """A token alone, which is decode, included."""
    torch.manual_seed(seed)
    (kv,), (queries,) = drawn([(cached, sum(chunks))], heads, 24, dtype)
    whole = attended(device, 16, [(cached, sum(chunks))], [kv], [queries])
    at = 0
    for chunk in [1, *chunks]:
        part = attended(device, 16, [(cached + at, chunk)], [kv[:, : cached + at + chunk]], [queries[at : at + chunk]])
        assert torch.equal(part, whole[at : at + chunk])
        at += chunk if (at, chunk) != (0, 1) else 0


@given(steps(), st.sampled_from([(4, 2), (8, 1)]), st.sampled_from(BOTH), st.sampled_from([30.0, 3e4]), seeds)
@settings(max_examples=30)
def test_of_huge_scores(
    device: CpuDevice, case: tuple[int, Lens], heads: tuple[int, int], dtype: torch.dtype, spread: float, seed: int
) -> None:
    """Nothing overflows: the largest score takes all, and a result is a mean of values."""
    torch.manual_seed(seed)
    block_size, lens = case
    kv, queries = drawn(lens, heads, 16, dtype, spread)
    got = attended(device, block_size, lens, kv, queries)
    assert bool(got.isfinite().all())
    if spread < 100:
        want = [plain_attention(of_one.double(), *pair.double(), 0.25) for of_one, pair in zip(queries, kv, strict=True)]
        assert float((got.double() - torch.cat(want).flatten(1)).abs().max()) < {torch.float32: 4e-3, torch.bfloat16: 2**-5}[dtype]
    for rows, pair in zip(torch.split(got, [len(of_one) for of_one in queries]), kv, strict=True):
        assert float(rows.abs().max()) <= float(pair[1].abs().max()) * 1.01


@given(st.integers(0, 600), st.integers(1, 140), st.sampled_from([0, 1]), st.sampled_from([torch.nan, torch.inf]), st.data())
@settings(max_examples=40)
def test_a_wild_token_spoils_those_that_see_it(
    device: CpuDevice, cached: int, new: int, part: int, wild: float, data: st.DataObject
) -> None:
    """And no other, in the same chunk or beside it."""
    token = data.draw(st.integers(0, cached + new - 1))
    heads, dtype = data.draw(st.sampled_from([(4, 2), (8, 1)])), data.draw(st.sampled_from(BOTH))
    torch.manual_seed(data.draw(seeds))
    lens = [(cached, new), (40, 3)]
    kv, queries = drawn(lens, heads, 16, dtype)
    before = attended(device, 16, lens, kv, queries)
    kv[0][part, token] = wild
    after = attended(device, 16, lens, kv, queries)
    spared = torch.arange(len(before)) < max(token - cached, 0)
    spared[new:] = True
    assert torch.equal(after[spared], before[spared])
    assert bool(after[~spared].isnan().all()) or wild == torch.inf


@pytest.mark.parametrize("dtype", BOTH)
def test_a_wild_query_spoils_its_own_row(device: CpuDevice, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lens = [(100, 30), (7, 1)]
    kv, queries = drawn(lens, (4, 2), 16, dtype)
    before = attended(device, 16, lens, kv, queries)
    queries[0][5, 2] = torch.nan
    after = attended(device, 16, lens, kv, queries).view(31, 4, 16)
    spoilt = torch.zeros(31, 4, dtype=torch.bool)
    spoilt[5, 2] = True
    assert bool(after[spoilt].isnan().all())
    assert torch.equal(after[~spoilt], before.view(31, 4, 16)[~spoilt])


@given(steps(), latent_dims, st.sampled_from([3, 70]), seeds)
@settings(max_examples=30)
def test_of_latents(device: CpuDevice, case: tuple[int, Lens], dims: LatentDims, num_heads: int, seed: int) -> None:
    """Contexts of several runs, more heads than a unit takes, rows that absorb beside chunks that expand."""
    torch.manual_seed(seed)
    block_size, lens = case
    rows = [torch.randn(1, sum(pair), 1, dims.latent + dims.rope) for pair in lens]
    queries, up = [torch.randn(new, num_heads, dims.nope + dims.rope) for _, new in lens], projections(dims, num_heads, torch.float32)
    step, cache = scattered(device, block_size, lens, rows)
    want = [plain_latent(of_one, held[0, :, 0], *up, 0.2) for of_one, held in zip(queries, rows, strict=True)]
    torch.testing.assert_close(step.attend_latent(torch.cat(queries), *up, cache, 0.2), torch.cat(want).flatten(1), rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("dtype", BOTH)
def test_of_nothing(device: CpuDevice, dtype: torch.dtype) -> None:
    cache = LayerCache(torch.empty(2, 3, 2, 16, 8, dtype=dtype).unbind(0))
    step = device.block_attention(Batch.build([]), cache)
    assert step.attend(torch.empty(0, 4, 8, dtype=dtype), cache, 1.0).shape == (0, 32)
    latent = LayerCache((torch.empty(3, 1, 16, 12, dtype=dtype),))
    up = torch.empty(4, 5, 8, dtype=dtype), torch.empty(4, 6, 8, dtype=dtype)
    assert device.block_attention(Batch.build([]), latent).attend_latent(torch.empty(0, 4, 9, dtype=dtype), *up, latent, 1.0).shape == (
        0,
        24,
    )


def test_of_queries_inside_a_wider_tensor(device: CpuDevice) -> None:
    """As a fused projection gives them."""
    torch.manual_seed(0)
    kv, queries = drawn([(20, 9)], (4, 2), 8, torch.float32)
    step, cache = scattered(device, 16, [(20, 9)], kv)
    wide = torch.cat((queries[0], torch.full((9, 4, 8), torch.nan)), dim=1)
    assert torch.equal(step.attend(wide[:, :4], cache, 1.0).clone(), step.attend(queries[0], cache, 1.0))


contexts = st.lists(st.tuples(cached_tokens, new_tokens), max_size=3)


@given(contexts, st.sampled_from([1, 2, 3, 8, 64, 65, 128, 200]))
def test_units_cover_every_row_and_key_once(lens: Lens, group: int) -> None:
    new, context_lens = (np.array([of(pair) for pair in lens], np.int32) for of in (lambda pair: pair[1], sum))
    cut = units(Contexts(new, context_lens, np.zeros((len(lens), 1), np.int32)), group)
    starts = np.cumsum(new) - new
    seen = {}
    for sequence, token, num_tokens, head, num_heads, start, stop, sees, partial in cut.items.tolist():
        assert 0 < num_tokens * num_heads <= cut.max_rows <= max(MAX_ROWS, group)
        assert sees == context_lens[sequence] - new[sequence] + token - starts[sequence] + 1
        assert start % RUN_KEYS == 0
        for row in range(num_tokens * num_heads):
            key = token + row // num_heads, head + row % num_heads
            seen.setdefault(key, []).append((start, stop, partial + row if partial >= 0 else None))
            last = sees + row // num_heads
            assert stop >= last or stop % RUN_KEYS == 0
    assert set(seen) == {(token, head) for token in range(new.sum()) for head in range(group)}
    merged = {(token, head): (partial, num_runs, stride) for token, head, partial, num_runs, stride in cut.merges.tolist()}
    taken = set()
    for key, runs in seen.items():
        runs.sort()
        assert runs[0][0] == 0 and all(before[1] == after[0] for before, after in pairwise(runs))
        if runs[0][2] is None:
            assert len(runs) == 1 and key not in merged
        else:
            first, num_runs, stride = merged[key]
            assert [run[2] for run in runs] == [first + i * stride for i in range(num_runs)]
            assert all(run[1] - run[0] <= RUN_KEYS for run in runs)
            assert taken.isdisjoint(run[2] for run in runs)
            taken.update(run[2] for run in runs)
    assert taken == set(range(cut.partial_rows))


@given(contexts, st.sampled_from([1, 2, 8, 128]), seeds)
def test_how_keys_are_cut_depends_on_the_sequence_alone(lens: Lens, group: int, seed: int) -> None:
    def runs(lens: Lens) -> set[tuple[int, ...]]:
        new, context_lens = (np.array([of(pair) for pair in lens], np.int32) for of in (lambda pair: pair[1], sum))
        cut = units(Contexts(new, context_lens, np.zeros((len(lens), 1), np.int32)), group)
        return {tuple(row) for row in cut.items[:, [2, 3, 4, 5, 6, 7]].tolist()}

    assert runs(lens) == set().union(*(runs([pair]) for pair in lens))
