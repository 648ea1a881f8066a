"""Linear maps and gating in plain torch. Functions behind CpuDevice; see baton.engine.devices.Device for shapes.

With int8 weights the products add up exactly, in int32, whichever kernel is taken: a row's result does not depend on its batch.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from baton.engine.devices import Matrix
from baton.engine.quantize import quantize_rows

_RUN = 128  # rows at a time: what lies between the quantized input and the output stays in the processor's cache
_NARROW = 1024  # with fewer inputs than this, weights are repacked in no time
_FEW = 6  # as many products with one row cost less than one with all
_GRAIN = 16  # a product with fewer rows takes as long as one with these many
_EXACT = 1024  # as many products of two int8 add up exactly in float32


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See Device.linear. For int8: int32 sums, times the row's scale, times the output's scale, plus bias in float32, then cast."""
    if weight.scales is None:
        return functional.linear(x, weight.values, bias)
    out = x.new_empty((len(x), len(weight)))
    for start in range(0, len(x), _RUN):
        rows = slice(start, start + _RUN)
        values, scales = quantize_rows(x[rows])
        wide = product(values, weight.values).float().mul_(scales).mul_(weight.scales)
        out[rows].copy_(wide if bias is None else wide.add_(bias))
    return out


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, in] @ weight [out, in] transposed, both int8 -> [N, out] int32, exact; not always contiguous.

    oneDNN repacks its right operand in every call, and slowly if it is a wide matrix transposed: so that is the input there, and the
    weights are only read. bench/ measures it.
    """
    if x.shape[1] == 1 or not is_exact():  # with one input oneDNN's sums are rubbish, seen in torch 2.13
        return product_in_float(x, weight)
    if len(x) == 1 or x.shape[1] < _NARROW:
        return torch._int_mm(x, weight.t())
    if len(x) <= _FEW:
        return torch.cat([torch._int_mm(row, weight.t()) for row in torch.split(x, 1)])
    padded = functional.pad(x, (0, 0, 0, -len(x) % _GRAIN))
    return torch._int_mm(weight, padded.t()).t()[: len(x)]


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See Device.silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@cache
def is_exact() -> bool:
    """Whether this processor adds products of int8 without saturation.

    oneDNN's kernels for x86 without VNNI add pairs of them in int16 and clip, silently
    (https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html): found out once, by the largest sums there are.
    """
    many = torch.full((_GRAIN, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(x, many.t()) == 64 * 127 * 127).all()) for x in (many, many[:1]))


def product_in_float(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same integers by float32, whose sums are exact below 2 ** 24; slower than weights that are not quantized."""
    total = torch.zeros((len(x), len(weight)), dtype=torch.int32)
    for left, right in zip(torch.split(x, _EXACT, 1), torch.split(weight, _EXACT, 1), strict=True):
        total += functional.linear(left.float(), right.float()).int()
    return total
