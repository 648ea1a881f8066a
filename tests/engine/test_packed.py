"""Packed linear maps and experts equal plain torch within the rounding of their sums, and a row's result is the same in any company."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from baton.engine.devices import Matrix, native
from baton.engine.devices.cpu import CpuDevice
from baton.engine.devices.cpu_moe import experts
from baton.engine.devices.native.build import library_path

PLAIN = CpuDevice()
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])
SEEDS = st.integers(0, 2**32)
ROWS = st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 300]))  # around the height of a tile, and of several
OUTS = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 513]))  # around the width of a panel
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 512, 1000, 1024, 2048]))  # the last two: rows that collide in the cache
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 2e-5}

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.find().how)


@pytest.fixture(scope="module", params=native.fitting(), ids=lambda level: level.name)
def device(request: pytest.FixtureRequest) -> CpuDevice:
    """With the kernels of every level that this processor has and the compiler knew."""
    path = library_path(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    return CpuDevice(native.opened(path))


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    yield
    torch.set_num_threads(before)


def noise(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """want: in float64. As near as one rounding to dtype and the rounding of sums in float32 allow."""
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    scale = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(scale, 1e-30))


@settings(deadline=None)
@given(SEEDS, DTYPES, ROWS, OUTS, WIDTHS, st.booleans())
@example(0, torch.bfloat16, 33, 65, 2049, True)
@example(0, torch.float32, 33, 65, 1024, False)
def test_a_linear_map(device, seed, dtype, rows, outs, width, biased):
    x, values, bias = noise(seed, dtype, rows, width), noise(seed + 1, dtype, outs, width), noise(seed + 2, dtype, outs)
    weight = device.prepare(Matrix(values))
    assert weight.packed is not None and weight.packed.shape == (outs, width)
    want = functional.linear(x.double(), values.double(), bias.double() if biased else None)
    assert_near(device.linear(x, weight, bias if biased else None), want, dtype)


@settings(deadline=None)
@given(SEEDS, DTYPES, ROWS, OUTS, WIDTHS, st.booleans())
def test_a_gated_one_is_a_linear_map_and_then_the_gate(device, seed, dtype, rows, outs, width, biased):
    """Bit for bit: the sums are the same, and rounded in the same places."""
    x, values, bias = noise(seed, dtype, rows, width), noise(seed + 1, dtype, 2 * outs, width), noise(seed + 2, dtype, 2 * outs)
    bias = bias if biased else None
    fused = device.gated_linear(x, device.prepare(Matrix(values), gated=True), bias)
    assert torch.equal(fused, device.silu_mul(device.linear(x, device.prepare(Matrix(values)), bias)))
    assert torch.equal(fused, device.gated_linear(x, device.prepare(Matrix(values)), bias))


@settings(deadline=None, max_examples=40)
@given(SEEDS, DTYPES, OUTS, WIDTHS)
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(device, seed, dtype, outs, width):
    x, weight = noise(seed, dtype, 150, width), device.prepare(Matrix(noise(seed + 1, dtype, outs, width)))
    with threads(1):
        alone = torch.cat([device.linear(x[row : row + 1], weight) for row in range(len(x))])
    for num_threads in (1, 2):
        with threads(num_threads):
            several = {rows: device.linear(x[-rows:], weight) for rows in (2, 5, 14, 15, 32, 129, 150)}
        assert all(torch.equal(got, alone[-rows:]) for rows, got in several.items())


@given(SEEDS, DTYPES)
def test_rows_that_lie_apart(device, seed, dtype):
    wide, weight = noise(seed, dtype, 9, 80), device.prepare(Matrix(noise(seed + 1, dtype, 33, 64)))
    assert torch.equal(device.linear(wide[:, 16:], weight), device.linear(wide[:, 16:].contiguous(), weight))
    assert torch.equal(device.linear(wide[::2, :64], weight), device.linear(wide[:, :64].contiguous(), weight)[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_stays_in_its_row(device, dtype):
    """Also where a row is filled up to whole words: the element beyond it is the next row's."""
    x, weight = torch.ones(3, 65, dtype=dtype), device.prepare(Matrix(torch.ones(40, 65, dtype=dtype)))
    x[1, 0] = torch.nan
    got = device.linear(x, weight)
    assert torch.equal(got.isfinite().all(1), torch.tensor([True, False, True])) and bool(got[1].isnan().all())
    assert bool((got[[0, 2]] == 65).all())


def test_weights_of_another_kind_stay_as_they_are(device):
    half, none = Matrix(torch.ones(8, 8, dtype=torch.float16)), Matrix(torch.ones(0, 8))
    int8 = Matrix(torch.ones(8, 8, dtype=torch.int8), torch.ones(8))
    assert all(device.prepare(weight) is weight for weight in (half, none, int8))
    packed = device.prepare(Matrix(torch.ones(8, 8)))
    assert device.prepare(packed) is packed
    assert PLAIN.prepare(half) is half


def chosen(seed: int, num_tokens: int, top_k: int, num_ids: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weights and ids of top_k different experts for each token, ids from `first` on."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_ids, generator=draw).argsort(1)[:, :top_k] + first
    return torch.rand(num_tokens, top_k, generator=draw), ids


@settings(deadline=None)
@given(SEEDS, DTYPES, st.integers(0, 70), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), OUTS, st.integers(1, 70))
@example(0, torch.bfloat16, 200, 2, 2, 0, 1024, 1024)
@example(0, torch.float32, 200, 2, 2, 1, 512, 512)
def test_experts(device, seed, dtype, num_tokens, top_k, num_experts, elsewhere, hidden, width):
    """Some of them on other ranks: ids below 0 and from num_experts on."""
    x = noise(seed, dtype, num_tokens, hidden)
    gate_up = Matrix((noise(seed + 1, torch.float32, num_experts, 2 * width, hidden) * hidden**-0.5).to(dtype))
    down = Matrix((noise(seed + 2, torch.float32, num_experts, hidden, width) * width**-0.5).to(dtype))
    num_ids = num_experts + 2 * elsewhere
    weights, ids = chosen(seed, num_tokens, min(top_k, num_ids), num_ids, -elsewhere)
    got = device.experts(x, weights, ids, device.prepare(gate_up, gated=True), device.prepare(down))
    want = experts(x, weights, ids, gate_up, down)
    assert got.shape == x.shape and got.dtype == dtype
    atol = 8 * TOLERANCE[dtype] * (want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@settings(deadline=None, max_examples=20)
@given(SEEDS, DTYPES)
def test_a_tokens_experts_do_not_depend_on_its_batch_nor_on_threads(device, seed, dtype):
    x = noise(seed, dtype, 60, 96)
    gate_up, down = (
        device.prepare(Matrix(noise(seed + 1, dtype, 6, 80, 96)), gated=True),
        device.prepare(Matrix(noise(seed + 2, dtype, 6, 96, 40))),
    )
    weights, ids = chosen(seed, 60, 3, 6, 0)
    alone = torch.cat([device.experts(x[i : i + 1], weights[i : i + 1], ids[i : i + 1], gate_up, down) for i in range(60)])
    for num_threads in (1, 2):
        with threads(num_threads):
            several = {rows: device.experts(x[:rows], weights[:rows], ids[:rows], gate_up, down) for rows in (2, 15, 60)}
        assert all(torch.equal(got, alone[:rows]) for rows, got in several.items())


@pytest.mark.parametrize(("outputs", "total"), [((256, 1, 1), 256), ((1, 1, 256), 258)])
def test_products_are_rounded_and_then_added_up_in_order_of_expert(device, outputs, total):
    """In bfloat16, where 256 + 1 is 256: the order of additions shows, and that the weight's last bit is lost before them."""
    gate_up, one = torch.ones(3, 2, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up[:, 0] = 64.0  # silu(64) * 1 = 64
    down = torch.tensor(outputs, dtype=torch.bfloat16)[:, None, None] / 64
    weights, ids = torch.tensor([[1.0, 1.0, 1 + 2**-9]]), torch.tensor([[2, 0, 1]])
    got = device.experts(one, weights, ids, device.prepare(Matrix(gate_up), gated=True), device.prepare(Matrix(down)))
    assert got.item() == experts(one, weights, ids, Matrix(gate_up), Matrix(down)).item() == total
