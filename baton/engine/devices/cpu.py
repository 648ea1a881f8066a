"""The cpu device in plain torch: the oracle that other devices are compared with. Exact in float32."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import ProcessGroupGloo, Store
from torch.nn import functional

from baton.engine.batch import Batch
from baton.engine.devices import Collectives, LayerCache, Matrix, cpu_linear, cpu_moe
from baton.engine.devices.cpu_attention import CpuBlockAttention
from baton.engine.spec import GateSpec

_DTYPES = {"int8": torch.int8, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuDevice:
    """Implements baton.engine.devices.Device; see there for shapes."""

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
        return CpuBlockAttention(batch, like)

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        local = ids - first_id
        mine = (local >= 0) & (local < len(table))
        if bool(mine.all()):
            return functional.embedding(local, table)
        rows = torch.zeros((len(ids), table.shape[1]), dtype=table.dtype)
        rows[mine] = table[local[mine]]
        return rows

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        return cpu_linear.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return cpu_linear.silu_mul(gate_up)

    def route(self, logits: torch.Tensor, gate: GateSpec, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return cpu_moe.route(logits, gate, bias)

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
        return cpu_moe.experts(x, weights, ids, gate_up, down)
