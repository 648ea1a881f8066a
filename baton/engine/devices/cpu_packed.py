"""Matrix products over weights packed once, by compiled kernels (native/gemm.c, native/moe.c). See baton.engine.devices for shapes.

Why kernels of our own: oneDNN's products of packed weights (torch.ops.mkldnn) cost about 14 us a call beside the work, read weights
at two thirds of what memory gives while there are few rows, and know nothing of experts; MKL's in float32 have no packed form in
torch, and the result of a row depends on how many are beside it. A tile that keeps its sums in registers over all of k
has neither flaw, and meets oneDNN where arithmetic is the limit. `python -m bench.micro.gemm` measures all of them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_long, c_void_p
from math import prod

import torch

from baton.engine.devices import Matrix, Packed
from baton.engine.devices.native import kernel

_SLAB_WORDS = 16 << 20
_PAD_BYTES = 64  # gemm.h's: what may lie between rows of an intermediate


class PackedProducts:
    """Linear maps and experts, bfloat16 and float32. What one packs only one of the same library can read.

    A row's result depends neither on its batch nor on the number of threads, which are torch's. Packed weights lie one after the
    other in slabs of memory, so that large pages hold small matrices as well; a slab lives as long as a matrix in it, or until the
    next one is begun.
    """

    def __init__(self, kernels: ctypes.CDLL) -> None:
        pointers, longs = [c_void_p] * 9, [c_long] * 5
        self._pack = kernel(kernels, "gemm_pack", (c_void_p, *longs[:4], c_void_p, c_int))
        self._gemm = kernel(kernels, "gemm", (*pointers[:4], *longs[:3], c_bool, c_int))
        self._experts = kernel(kernels, "experts", (*pointers, *longs, c_int))
        self._panel: int = kernels.gemm_panel()
        self._prefer_large_pages = kernels.gemm_prefer_large_pages
        self._prefer_large_pages.argtypes, self._prefer_large_pages.restype = (c_void_p, c_long), None
        self._slab = torch.empty(0, dtype=torch.int32)  # what is left of it
        self._plan_len = kernels.experts_plan_len
        self._plan_len.argtypes, self._plan_len.restype = (c_long, c_long, c_long), c_long

    def pack(self, weight: Matrix, gated: bool) -> Matrix:
        """See Device.prepare. What the kernels do not take comes back as it is."""
        values, run = weight.values, self._pack.get(weight.values.dtype)
        if run is None or weight.packed is not None or not values.numel():
            return weight
        *leading, rows, width = values.shape
        parts = 2 if gated else 1
        count, part_rows, values = values[..., 0, 0].numel(), rows // parts, values.contiguous()
        steps = -(-width * values.element_size() // 4)
        packed = self._words((*leading, parts * -(-part_rows // self._panel), steps, self._panel))
        run(values.data_ptr(), count, parts, part_rows, width, packed.data_ptr(), torch.get_num_threads())
        return Matrix(packed, packed=Packed((*leading, rows, width), values.dtype, gated))

    def _words(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for packed weights, int32 of this shape."""
        num_words = prod(shape)
        if num_words > len(self._slab):
            self._slab = torch.empty(max(num_words, _SLAB_WORDS), dtype=torch.int32)  # not touched, and so not there, until it is used
            self._prefer_large_pages(self._slab.data_ptr(), self._slab.nbytes)
        words, self._slab = self._slab[:num_words], self._slab[num_words:]
        return words.view(shape)

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See Device.linear, and for gated weights Device.gated_linear. weight: packed here."""
        packed = weight.packed
        assert packed is not None and x.dtype == packed.dtype and x.shape[1] == packed.shape[1], (x.shape, packed)
        x, (rows, width) = x.contiguous(), packed.shape
        num_outputs = rows // 2 if packed.gated else rows
        out = x.new_empty((len(x), num_outputs))
        biases = None if bias is None else bias.data_ptr()
        sizes = len(x), num_outputs, width, packed.gated, torch.get_num_threads()
        self._gemm[x.dtype](x.data_ptr(), weight.values.data_ptr(), biases, out.data_ptr(), *sizes)
        return out

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
        """See Device.experts. gate_up: packed here as gated; down: packed here."""
        assert gate_up.packed is not None and gate_up.packed.gated and down.packed is not None and x.dtype == down.packed.dtype
        num_experts, hidden, width = down.packed.shape
        (num_tokens, top_k), x, weights, ids = ids.shape, x.contiguous(), weights.contiguous(), ids.contiguous()
        assert x.shape == (num_tokens, hidden) and weights.dtype == torch.float32 and ids.dtype == torch.int64
        out, outs = x.new_empty(x.shape), x.new_empty((num_tokens * top_k, hidden))
        inner = x.new_empty((num_tokens * top_k, width + _PAD_BYTES // x.element_size()))
        plan = torch.empty(self._plan_len(num_tokens, top_k, num_experts), dtype=torch.int32)
        given = (tensor.data_ptr() for tensor in (x, weights, ids, gate_up.values, down.values, plan, inner, outs, out))
        self._experts[x.dtype](*given, num_tokens, top_k, num_experts, hidden, width, torch.get_num_threads())
        return out
