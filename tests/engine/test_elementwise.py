"""Kernels between matrix products equal plain torch: bit for bit where no sum is involved, within an ulp or two where one is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row
from baton.engine.devices import HeadNorms, LatentNorm, LayerCache, native
from baton.engine.devices.cpu import CpuDevice
from baton.engine.devices.cpu_elementwise import TorchElementwise
from baton.engine.devices.cpu_kernels import NativeElementwise
from baton.engine.devices.cpu_slots import Slots
from baton.engine.devices.native.build import library_path

PLAIN = TorchElementwise()
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])
SEEDS = st.integers(0, 2**32)
# A sum of squares in another order is a few ulps off, on both sides; in bfloat16 that may turn two roundings.
NORM_ULPS = {torch.bfloat16: 2, torch.float32: 10}
ROWS = st.integers(0, 9)
WIDTHS = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 100, 512, 1000])


@pytest.fixture(scope="module", params=native.fitting(), ids=lambda level: level.name)
def kernels(request: pytest.FixtureRequest) -> NativeElementwise:
    """Those of every level that this processor has and the compiler knew."""
    path = library_path(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    return NativeElementwise(native.opened(path))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def noise(seed: int, dtype: torch.dtype, *shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def ulps(x: torch.Tensor, y: torch.Tensor) -> int:
    """How many floats lie between two results, at most; 0 and -0 are one."""
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    flip = 2 ** (15 if x.dtype == torch.bfloat16 else 31)
    ordered = [torch.where(bits(part) < 0, -flip - bits(part).long(), bits(part).long()) for part in (x, y)]
    return int((ordered[0] - ordered[1]).abs().max()) if x.numel() else 0


def equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """To the last bit, but for the sign of 0."""
    return ulps(x, y) == 0


@given(SEEDS, DTYPES, ROWS, WIDTHS, st.sampled_from([1e-6, 1e-2]))
def test_norm(kernels, seed, dtype, rows, width, eps):
    x, weight = noise(seed, dtype, rows, width + 3)[:, 3:], noise(seed + 1, dtype, width)
    assert ulps(kernels.rms_norm(x, weight, eps), PLAIN.rms_norm(x, weight, eps)) <= NORM_ULPS[dtype]


@given(SEEDS, DTYPES, ROWS, WIDTHS)
def test_sum_and_norm(kernels, seed, dtype, rows, width):
    x, residual, weight = noise(seed, dtype, rows, width), noise(seed + 1, dtype, rows, width), noise(seed + 2, dtype, width)
    total = residual + x
    normed, kept = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert equal(kept, total) and equal(normed, kernels.rms_norm(total, weight, 1e-6))


@given(SEEDS, DTYPES, ROWS, WIDTHS, st.sampled_from([1.0, 30.0]))
def test_gating(kernels, seed, dtype, rows, width, spread):
    gate_up = noise(seed, dtype, rows, 2 * width, spread=spread)
    got, wanted = kernels.silu_mul(gate_up), PLAIN.silu_mul(gate_up)
    # Below the smallest normal number a float has fewer digits, and torch's exponential ends earlier.
    assert ulps(torch.where(wanted.abs() < 1e-36, 0, got), torch.where(wanted.abs() < 1e-36, 0, wanted)) <= (
        1 if dtype == torch.bfloat16 else 8
    )
    assert torch.all(got[wanted.abs() < 1e-36].abs() < 2e-36)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gating_at_the_edges(kernels, dtype):
    edges = torch.tensor([0.0, -0.0, 88.0, -88.0, 104.0, -104.0, 1e30, -1e30, torch.inf, torch.nan], dtype=dtype)
    gate_up = torch.stack((edges, torch.ones_like(edges)), dim=1).reshape(-1, 2)
    torch.testing.assert_close(kernels.silu_mul(gate_up), PLAIN.silu_mul(gate_up), equal_nan=True, atol=1e-35, rtol=1e-2)


@given(SEEDS, DTYPES, ROWS, st.integers(1, 5), st.sampled_from([2, 6, 32, 64, 128, 192, 256]), st.booleans())
def test_rotation(kernels, seed, dtype, tokens, heads, dim, interleaved):
    x = noise(seed, dtype, tokens, heads + 1, dim + 2)[:, 1:, 2:]
    cos, sin = noise(seed + 1, dtype, tokens, 1, dim // 2), noise(seed + 2, dtype, tokens, 1, dim // 2)
    assert equal(kernels.rotate(x, cos, sin, interleaved), PLAIN.rotate(x, cos, sin, interleaved))


@given(SEEDS, DTYPES, st.integers(-3, 3))
def test_table(kernels, seed, dtype, first_id):
    table = noise(seed, dtype, 5, 7)
    ids = torch.arange(-10, 20)
    assert equal(kernels.embed(ids, table, first_id), PLAIN.embed(ids, table, first_id))


@dataclass
class Case:
    """A step over `lens` (cached tokens, new tokens), and the caches of two layers in which its tokens have slots."""

    batch: Batch
    cache: LayerCache
    qkv: torch.Tensor
    norms: HeadNorms | None
    cos: torch.Tensor
    sin: torch.Tensor

    def entered(self, small: TorchElementwise | NativeElementwise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, and what is then in the cache."""
        cache = LayerCache(tuple(part.clone(memory_format=torch.preserve_format) for part in self.cache.parts))
        return small.enter(self.qkv, self.norms, self.cos, self.sin, Slots(self.batch, cache), cache), *cache.parts


@st.composite
def cases(draw: st.DrawFn, normed: bool) -> Case:
    dtype, seed, block_size = draw(DTYPES), draw(SEEDS), draw(st.sampled_from([1, 3, 16]))
    num_kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([2, 8, 64, 96, 128, 256, 512]))
    lens = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=4))
    counts = [-(-sum(pair) // block_size) for pair in lens]
    free = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    batch = Batch.build([Row([0] * new, cached, [free.pop() for _ in range(n)]) for (cached, new), n in zip(lens, counts, strict=True)])
    num_tokens, num_blocks = batch.num_tokens, sum(counts) + 2
    memory = torch.full((num_blocks, 2, 2, num_kv_heads, block_size, dim), torch.nan, dtype=dtype)
    qkv = noise(seed, dtype, num_tokens, (group + 2) * num_kv_heads * dim)
    cos, sin = noise(seed + 1, dtype, num_tokens, 1, dim // 2), noise(seed + 2, dtype, num_tokens, 1, dim // 2)
    norms = HeadNorms(noise(seed + 3, dtype, dim), noise(seed + 4, dtype, dim), 1e-6) if normed else None
    return Case(batch, LayerCache(memory[:, 1].unbind(1)), qkv, norms, cos, sin)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """NaN, what a slot holds that nobody wrote, is the same as NaN."""
    return torch.equal(x.isnan(), y.isnan()) and equal(x.nan_to_num(), y.nan_to_num())


@given(cases(normed=False))
def test_way_into_the_cache(kernels, case):
    assert all(map(same, case.entered(kernels), case.entered(PLAIN)))


@given(cases(normed=True))
def test_way_into_the_cache_with_norms(kernels, case):
    """Rotation may cancel, and then an ulp of the norm is many of the result: so the norm is the kernel's in what is compared with."""

    class Mixed(TorchElementwise):
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return kernels.rms_norm(x.reshape(-1, x.shape[2]), weight, eps).view(x.shape)

    assert all(map(same, case.entered(kernels), case.entered(Mixed())))


@given(SEEDS, DTYPES, st.lists(st.integers(1, 9), max_size=3), st.integers(1, 3), st.sampled_from([2, 8, 64, 128]), st.booleans())
def test_way_of_a_latent_into_the_cache(kernels, seed, dtype, lens, num_heads, turned, interleaved):
    plain, latent = 2 * turned, 3 * turned
    batch = Batch.build([Row([0] * new, 3, [i, i + 5, i + 10]) for i, new in enumerate(lens)])
    queries, compressed = noise(seed, dtype, sum(lens), num_heads, plain + turned), noise(seed + 1, dtype, sum(lens), latent + turned)
    norm = LatentNorm(noise(seed + 2, dtype, latent), 1e-6)
    cos, sin = noise(seed + 3, dtype, sum(lens), 1, turned // 2), noise(seed + 4, dtype, sum(lens), 1, turned // 2)
    found = []
    for small in (kernels, PLAIN):
        cache = LayerCache((torch.full((15, 2, 1, 4, latent + turned), torch.nan, dtype=dtype)[:, 1],))
        entered = small.enter_latent(queries, compressed, norm, cos, sin, interleaved, Slots(batch, cache), cache)
        found.append((entered, *cache.parts[0].split([latent, turned], dim=-1)))
    (entered, latents, keys), (wanted, wanted_latents, wanted_keys) = found
    assert equal(entered, wanted) and same(keys, wanted_keys) and torch.equal(latents.isnan(), wanted_latents.isnan())
    assert ulps(latents.nan_to_num(), wanted_latents.nan_to_num()) <= NORM_ULPS[dtype]


@given(SEEDS, DTYPES, st.integers(1, 6), st.sampled_from([1, 2, 15, 511, 512, 513, 2000]), st.booleans())
def test_largest(kernels, seed, dtype, rows, width, coarse):
    """Among equals the first: with few values there are many."""
    logits = noise(seed, dtype, rows, width + 1)[:, :width]
    logits = logits.round() if coarse else logits
    ids, finite = kernels.argmax(logits)
    assert finite.all() and torch.equal(ids, PLAIN.argmax(logits)[0])


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -3e38, 1e-40, -1e-40])


@given(DTYPES, st.lists(SPECIAL, min_size=1, max_size=6), st.integers(0, 700))
def test_largest_of_anything(kernels, dtype, values, padding):
    logits = torch.tensor([[*values, *[values[-1]] * padding]], dtype=dtype)
    (ids, finite), (wanted_ids, wanted_finite) = kernels.argmax(logits), PLAIN.argmax(logits)
    assert bool(finite) == bool(wanted_finite)
    assert 0 <= int(ids) < logits.shape[1] and (not finite or torch.equal(ids, wanted_ids))


def test_a_nan_with_its_sign_set_is_seen(kernels):
    logits = torch.tensor([[0x3F80, 0xFFC0 - 0x10000, 0]], dtype=torch.int16).view(torch.bfloat16)
    assert logits[0].isnan().tolist() == [False, True, False] and not kernels.argmax(logits)[1]


@given(
    *(SEEDS, DTYPES, st.integers(1, 6), st.sampled_from([1, 2, 15, 511, 512, 513, 2000]), st.sampled_from([1e-30, 0.3, 1.0, 7.0])),
    st.sampled_from([0.0, 0.25, 0.7, 1 - 2.0**-24]),
)
def test_draws(kernels, seed, dtype, rows, width, temperature, u):
    """Against sums in float64: what is drawn has a weight, and the sums before and behind it lie on either side of u, but for rounding."""
    logits = (5 * noise(seed, dtype, rows, width + 1))[:, :width]
    logits[:, ::3] = -torch.inf
    logits[:, width // 2] = 9.0
    top_ids = PLAIN.argmax(logits)[0]
    ids = kernels.draw(logits, top_ids, torch.full((rows,), temperature), torch.full((rows,), u))
    largest = logits.double().gather(1, top_ids.unsqueeze(1))
    weights = ((logits.double() - largest) / torch.tensor(temperature).double()).exp()
    drawn, until = weights.gather(1, ids.unsqueeze(1)), weights.cumsum(1)
    behind, total = until.gather(1, ids.unsqueeze(1)), until[:, -1:]
    assert (drawn > 0).all()
    assert (behind > (u - 1e-6) * total).all() and (behind - drawn <= (u + 1e-6) * total).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_are_those_of_torch(kernels, dtype):
    """All but those that lie as near to the edge as float32 rounds."""
    logits, u = noise(0, dtype, 500, 5000), torch.arange(500) / 500
    top_ids, temperatures = PLAIN.argmax(logits)[0], torch.full((500,), 0.8)
    ids, wanted = (small.draw(logits, top_ids, temperatures, u) for small in (kernels, PLAIN))
    assert int((ids != wanted).sum()) <= 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_their_company(kernels, dtype):
    """Enough of them for several threads, beside one at a time."""
    x, residual, weight = noise(0, dtype, 300, 512), noise(1, dtype, 300, 512), noise(2, dtype, 512)
    cos, sin, top_ids = noise(3, dtype, 300, 1, 32), noise(4, dtype, 300, 1, 32), PLAIN.argmax(x)[0]
    operations: list[Callable[[slice], torch.Tensor]] = [
        lambda rows: kernels.rms_norm(x[rows], weight, 1e-6),
        lambda rows: torch.cat(kernels.add_rms_norm(x[rows], residual[rows].clone(), weight, 1e-6), dim=1),
        lambda rows: kernels.silu_mul(x[rows]),
        lambda rows: kernels.rotate(x.view(300, 8, 64)[rows], cos[rows], sin[rows]),
        lambda rows: kernels.argmax(x[rows])[0],
        lambda rows: kernels.draw(x[rows], top_ids[rows], torch.ones(300)[rows], (torch.arange(300) / 300)[rows]),
    ]
    for operation in operations:
        alone = torch.cat([operation(slice(row, row + 1)) for row in range(300)])
        assert torch.equal(operation(slice(None)), alone)


def test_other_dtypes_stay_with_torch(kernels):
    x, weight = noise(0, torch.float16, 3, 8), noise(1, torch.float16, 8)
    assert torch.equal(kernels.rms_norm(x, weight, 1e-6), PLAIN.rms_norm(x, weight, 1e-6))
    assert torch.equal(kernels.silu_mul(x), PLAIN.silu_mul(x))
    assert torch.equal(kernels.argmax(x)[0], PLAIN.argmax(x)[0])
    hot = PLAIN.argmax(x)[0], torch.ones(3), torch.full((3,), 0.5)
    assert torch.equal(kernels.draw(x, *hot), PLAIN.draw(x, *hot))
    assert all(map(torch.equal, kernels.add_rms_norm(x, x, weight, 1e-6), PLAIN.add_rms_norm(x, x, weight, 1e-6)))


@settings(max_examples=5)
@given(cases(normed=True))
def test_a_device_without_kernels_does_the_same(case):
    (queries, *_), cache = case.entered(PLAIN), LayerCache(tuple(part.clone() for part in case.cache.parts))
    assert equal(CpuDevice().block_attention(case.batch, cache).enter(case.qkv, case.norms, case.cos, case.sin, cache), queries)
