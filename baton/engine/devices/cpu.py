"""The cpu device: compiled kernels where this processor has them, plain torch where not.

In plain torch it is the oracle that other devices, and the kernels, are compared with. Exact in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import ProcessGroupGloo, Store

from baton.engine.batch import Batch
from baton.engine.devices import Collectives, LayerCache, Matrix, cpu_linear, cpu_moe
from baton.engine.devices.cpu_attention import CpuBlockAttention
from baton.engine.devices.cpu_elementwise import Elementwise, TorchElementwise
from baton.engine.devices.cpu_kernels import NativeElementwise
from baton.engine.devices.cpu_native_attention import AttentionKernels
from baton.engine.devices.cpu_packed import PackedProducts
from baton.engine.spec import GateSpec

_DTYPES = {"int8": torch.int8, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuDevice:
    """Implements baton.engine.devices.Device; see there for shapes. kernels: those of baton.engine.devices.native, or torch alone."""

    def __init__(self, kernels: ctypes.CDLL | None = None) -> None:
        self._kernels = kernels
        self._small: Elementwise = TorchElementwise() if kernels is None else NativeElementwise(kernels)
        self._attention = None if kernels is None else AttentionKernels(kernels)
        self._packed = None if kernels is None else PackedProducts(kernels)

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=_DTYPES[dtype])

    def tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array.copy())

    def collectives(self, store: Store, rank: int, size: int, bind: str, timeout_s: float) -> Collectives:
        """A gloo group of its own, not one of torch.distributed's global ones: these can only bind by environment variable."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=bind)]
        options._timeout = timedelta(seconds=timeout_s)
        return cast(Collectives, ProcessGroupGloo(store, rank, size, options))

    def block_attention(self, batch: Batch, like: LayerCache) -> CpuBlockAttention:
        return CpuBlockAttention(batch, like, self._small, self._attention)

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        return self._small.embed(ids, table, first_id)

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.packed is None:
            return cpu_linear.linear(x, weight, bias)
        assert self._packed is not None and not weight.packed.gated
        return self._packed.linear(x, weight, bias)

    def gated_linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.packed is None or not weight.packed.gated:
            return self.silu_mul(self.linear(x, weight, bias))
        assert self._packed is not None
        return self._packed.linear(x, weight, bias)

    def prepare(self, weight: Matrix, gated: bool = False) -> Matrix:
        return weight if self._packed is None else self._packed.pack(weight, gated)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._small.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        return self._small.add_rms_norm(x, residual, weight, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        return self._small.rotate(x, cos, sin, interleaved)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._small.silu_mul(gate_up)

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._small.argmax(logits)

    def draw(self, logits: torch.Tensor, top_ids: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return self._small.draw(logits, top_ids, temperatures, uniforms)

    def route(self, logits: torch.Tensor, gate: GateSpec, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return cpu_moe.route(logits, gate, bias)

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
        if gate_up.packed is None:
            return cpu_moe.experts(x, weights, ids, gate_up, down)
        assert self._packed is not None
        return self._packed.experts(x, weights, ids, gate_up, down)
