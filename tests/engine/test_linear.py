"""Linear maps over int8 weights: the same integers whichever kernel adds them up, so that a row's result does not depend on its batch."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.devices import Matrix
from baton.engine.devices.cpu_linear import linear, product, product_in_float
from baton.engine.quantize import quantize_rows

ROWS = (0, 1, 2, 6, 7, 16, 17, 128, 130)
WIDTHS = (1, 64, 1023, 1024, 2100)  # around what `product` decides by, and beyond what float32 adds up exactly at once


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_kernel_gives_the_exact_sums(rows: int, width: int) -> None:
    x, weight = int8(rows, width), int8(33, width)
    exact = (x.long() @ weight.long().t()).int()
    assert torch.equal(product_in_float(x, weight), exact)
    if rows:
        assert torch.equal(product(x, weight), exact)


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_largest_sums_are_exact(rows: int, x: int, weight: int) -> None:
    """Where a processor would clip pairs in int16, and where float32 has no room to spare."""
    width = 3000
    for kernel in (product, product_in_float):
        sums = kernel(torch.full((rows, width), x, dtype=torch.int8), torch.full((24, width), weight, dtype=torch.int8))
        assert bool((sums == width * x * weight).all())


@pytest.mark.slow
def test_a_processor_without_vnni_computes_the_same() -> None:
    """All of this file, with the kernels of an older processor: they clip, which is found out."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the variable means something on x86 only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True, timeout=100)
    asked = "from baton.engine.devices.cpu_linear import is_exact; raise SystemExit(is_exact())"
    subprocess.run([sys.executable, "-c", asked], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True, timeout=60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width"), [(40, 64), (72, 1100)])
def test_a_row_does_not_depend_on_its_batch(out: int, width: int, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the number of rows beside it, and also where rows are computed in several runs."""
    values, scales = quantize_rows(torch.randn(out, width))
    weight, bias = Matrix(values, scales.view(-1)), torch.randn(out).to(dtype)
    x = torch.randn(150, width).to(dtype)
    alone = torch.cat([linear(x[row : row + 1], weight, bias) for row in range(len(x))])
    for rows in (2, 5, 7, 32, 129, 150):
        assert torch.equal(linear(x[-rows:], weight, bias), alone[-rows:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype: torch.dtype) -> None:
    """Scales multiply in float32 and the bias is added there; the result has the input's dtype and is contiguous."""
    values, scales = quantize_rows(torch.randn(48, 1100))
    x, bias = torch.randn(20, 1100).to(dtype), torch.randn(48).to(dtype)
    x_values, x_scales = quantize_rows(x)
    sums = (x_values.long() @ values.long().t()).float()
    got = linear(x, Matrix(values, scales.view(-1)), bias)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, (sums * x_scales * scales.view(-1) + bias.float()).to(dtype))


def test_nothing_and_zeros() -> None:
    values, scales = quantize_rows(torch.zeros(8, 64))
    weight = Matrix(values, scales.view(-1))
    assert linear(torch.zeros(0, 64), weight).shape == (0, 8)
    assert torch.equal(linear(torch.zeros(3, 64), weight), torch.zeros(3, 8))
    mixed = torch.cat([torch.zeros(1, 64), torch.ones(1, 64)])
    assert torch.equal(linear(mixed, Matrix(torch.ones(8, 64, dtype=torch.int8), torch.ones(8))), mixed[:, :8] * 64)


def test_what_is_not_finite_stays_so() -> None:
    weight = Matrix(torch.ones(8, 64, dtype=torch.int8), torch.ones(8))
    x = torch.ones(3, 64)
    x[1, 5] = torch.nan
    assert torch.equal(linear(x, weight).isfinite().all(1), torch.tensor([True, False, True]))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.floats(-150, 105))
def test_a_round_trip_is_off_by_half_a_scale(seed: int, rows: int, columns: int, exponent: float) -> None:
    """Over the whole range of float32 where scales are normal, and rows of very different size beside each other."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw) * 2.0**exponent * 10.0 ** torch.randn(rows, 1, generator=draw)
    values, scales = quantize_rows(x)
    assert int(values.abs().max()) <= 127
    off = (values.double() * scales.double() - x.double()).abs()
    assert bool((off <= scales.double() * (0.5 + 1e-5)).all())
    largest = x.abs().amax(1, keepdim=True) > 127 * torch.finfo(torch.float32).tiny
    assert bool(((values.abs().amax(1, keepdim=True) == 127) | ~largest).all())
