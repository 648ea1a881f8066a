"""What lies between matrix products, by compiled kernels (native/elementwise.c). See baton.engine.devices for shapes.

A call costs a few microseconds, most of it Python: of a decode row, that is what counts. Rows of a result do not depend on each other.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch

from baton.engine.devices import HeadNorms, LatentNorm, LayerCache
from baton.engine.devices.cpu_elementwise import TorchElementwise
from baton.engine.devices.cpu_slots import Slots
from baton.engine.devices.native import kernel


class NativeElementwise:
    """Implements Elementwise: bfloat16 and float32 by kernels, what they do not take by torch."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._plain = TorchElementwise()
        pointers = [c_void_p] * 8
        self._rms_norm = kernel(kernels, "rms_norm", (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_float, c_void_p))
        self._add_rms_norm = kernel(kernels, "add_rms_norm", (*pointers[:3], c_int64, c_int64, c_float, c_void_p))
        self._rotate = kernel(kernels, "rotate", (c_void_p, *[c_int64] * 5, *pointers[:2], c_int64, c_void_p))
        self._silu_mul = kernel(kernels, "silu_mul", (c_void_p, c_int64, c_int64, c_void_p))
        self._embed = kernel(kernels, "embed", (c_void_p, c_int64, c_void_p, *[c_int64] * 3, c_void_p))
        self._argmax = kernel(kernels, "argmax", (c_void_p, *[c_int64] * 3, *pointers[:2]))
        self._draw = kernel(kernels, "draw", (c_void_p, *[c_int64] * 3, *pointers[:5]))
        self._draw_part: int = kernels.draw_part()
        latent = (c_void_p, *[c_int64] * 3, *pointers[:2], c_float, *pointers[:2], c_int64, *pointers[:3])
        self._enter_latent = kernel(kernels, "enter_latent", latent)
        self._enter = kernel(kernels, "enter", (c_void_p, c_int64, *pointers[:3], c_float, *pointers[:5]))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        run = self._rms_norm.get(x.dtype)
        if run is None or x.ndim != 2 or x.stride(1) != 1:
            return self._plain.rms_norm(x, weight, eps)
        out = x.new_empty(x.shape)
        run(x.data_ptr(), x.stride(0), weight.data_ptr(), *x.shape, eps, out.data_ptr())
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        run = self._add_rms_norm.get(x.dtype)
        if run is None or not (x.is_contiguous() and residual.is_contiguous()):
            return self._plain.add_rms_norm(x, residual, weight, eps)
        out = torch.empty_like(x)
        run(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), *x.shape, eps, out.data_ptr())
        return out, residual

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        run = self._rotate.get(x.dtype)
        if run is None or x.stride(2) != 1:
            return self._plain.rotate(x, cos, sin, interleaved)
        out = x.new_empty(x.shape)
        run(x.data_ptr(), x.stride(0), x.stride(1), *x.shape, cos.data_ptr(), sin.data_ptr(), interleaved, out.data_ptr())
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        run = self._silu_mul.get(gate_up.dtype)
        if run is None or not gate_up.is_contiguous():
            return self._plain.silu_mul(gate_up)
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        run(gate_up.data_ptr(), rows, width, out.data_ptr())
        return out

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        run = self._embed.get(table.dtype)
        if run is None:
            return self._plain.embed(ids, table, first_id)
        out = table.new_empty((len(ids), table.shape[1]))
        run(ids.data_ptr(), len(ids), table.data_ptr(), first_id, *table.shape, out.data_ptr())
        return out

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        run = self._argmax.get(logits.dtype)
        if run is None or logits.stride(1) != 1:
            return self._plain.argmax(logits)
        ids, finite = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.bool)
        run(logits.data_ptr(), logits.stride(0), *logits.shape, ids.data_ptr(), finite.data_ptr())
        return ids, finite

    def draw(self, logits: torch.Tensor, top_ids: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        run = self._draw.get(logits.dtype)
        if run is None or logits.stride(1) != 1:
            return self._plain.draw(logits, top_ids, temperatures, uniforms)
        num_rows, vocab = logits.shape
        ids, sums = torch.empty_like(top_ids), torch.empty(num_rows, -(-vocab // self._draw_part))
        given = (tensor.data_ptr() for tensor in (top_ids, temperatures, uniforms, sums, ids))
        run(logits.data_ptr(), logits.stride(0), num_rows, vocab, *given)
        return ids

    def enter(
        self, qkv: torch.Tensor, norms: HeadNorms | None, cos: torch.Tensor, sin: torch.Tensor, slots: Slots, cache: LayerCache
    ) -> torch.Tensor:
        run, dim = self._enter.get(qkv.dtype), slots.dim
        if run is None:
            return self._plain.enter(qkv, norms, cos, sin, slots, cache)
        keys, values = cache.parts
        num_heads = qkv.shape[1] // dim - 2 * slots.num_kv_heads
        queries = qkv.new_empty((slots.num_tokens, num_heads, dim))
        weights = (None, None, 0.0) if norms is None else (norms.query.data_ptr(), norms.key.data_ptr(), norms.eps)
        caches = cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr()
        run(slots.address, num_heads, qkv.data_ptr(), *weights, *caches, queries.data_ptr())
        return queries

    def enter_latent(
        self,
        queries: torch.Tensor,
        compressed: torch.Tensor,
        norm: LatentNorm,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        slots: Slots,
        cache: LayerCache,
    ) -> torch.Tensor:
        run, latent = self._enter_latent.get(queries.dtype), len(norm.weight)
        if run is None:
            return self._plain.enter_latent(queries, compressed, norm, cos, sin, interleaved, slots, cache)
        assert queries.is_contiguous() and compressed.is_contiguous()
        out = torch.empty_like(queries)
        _, num_heads, width = queries.shape
        turned = slots.dim - latent
        run(
            *(slots.address, num_heads, width - turned, latent, compressed.data_ptr(), norm.weight.data_ptr(), norm.eps),
            *(cos.data_ptr(), sin.data_ptr(), interleaved, cache.parts[0].data_ptr(), queries.data_ptr(), out.data_ptr()),
        )
        return out
