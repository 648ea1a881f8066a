"""Attention over blocks: kernels beside torch's gather and fused attention, and what memory and matrix products give in the same run.

Blocks lie in any order in a cache of several layers, taken in turn, so that they come from memory as those of a model do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.engine.batch import Batch
from baton.engine.batch import Row as Part
from baton.engine.devices import LayerCache, native
from baton.engine.devices.cpu import CpuDevice
from bench.micro.limits import Limits
from bench.micro.row import Row
from bench.timing import Call, alternated
from kv_transfer.pool import Pool

_CACHES_BYTES = 1 << 27  # beyond what caches hold
_MAX_LAYERS = 64


@dataclass(frozen=True, slots=True)
class Load:
    """`batch` sequences that compute their last `chunk` tokens of `context`.."""

    batch: int
    context: int
    chunk: int = 1
    heads: int = 8
    kv_heads: int = 4
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes_read(self) -> int:
        """Keys and values of all contexts, once."""
        return 2 * self.batch * self.context * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def operations(self) -> int:
        """Those of scores and of weighted values, where a token sees what is before it and itself."""
        seen = self.batch * sum(range(self.context - self.chunk + 1, self.context + 1))
        return 4 * seen * self.heads * self.dim

    def __str__(self) -> str:
        what = "decode" if self.chunk == 1 else f"chunks of {self.chunk}"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {what} at {self.context:,}, {self.heads}/{self.kv_heads} heads of {self.dim}, {name}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds a layer takes: by the device's way, and by torch alone."""

    load: Load
    seconds: float
    torch_s: float

    @property
    def bytes_per_s(self) -> float:
        """Keys and values read."""
        return self.load.bytes_read / self.seconds

    @property
    def flops(self) -> float:
        """Operations per second."""
        return self.load.operations / self.seconds


LOADS = (
    Load(128, 75),
    Load(16, 600),
    Load(1, 1_000),
    Load(1, 100_000),
    Load(16, 1_000, heads=32, kv_heads=8, dim=128),
    Load(16, 1_000, heads=32, kv_heads=4, dim=128),
    Load(16, 50, 50),
    Load(1, 512, 512),
    Load(1, 2_000, 2_000),
    Load(1, 2_000, 256),
    Load(1, 2_000, 2_000, heads=32, kv_heads=8, dim=128),
)


@torch.inference_mode()
def rows(limits: Limits, loads: Sequence[Load] = LOADS) -> Iterator[Row]:
    """Load by load in bfloat16 and float32: rates beside the nearer limit, and the time beside torch's."""
    for dtype, peak in ((torch.bfloat16, limits.bf16_flops), (torch.float32, limits.fp32_flops)):
        for load in loads:
            found = measured(Load(load.batch, load.context, load.chunk, load.heads, load.kv_heads, load.dim, load.block_size, dtype))
            if load.bytes_read / limits.memcpy_bytes_per_s > load.operations / peak:
                yield Row(f"{found.load}", found.bytes_per_s / 1e9, "GB/s", limits.memcpy_bytes_per_s / 1e9, "memcpy")
            else:
                yield Row(f"{found.load}", found.flops / 1e9, "GFLOP/s", peak / 1e9, "GEMM peak")
            yield Row(f"{found.load}", 1e3 * found.seconds, "ms", 1e3 * found.torch_s, "torch alone")


def measured(load: Load) -> Measured:
    """With the threads that torch has now. Both ways are torch's where there are no kernels."""
    caches, step = _laid_out(load)
    queries = torch.randn(step.num_tokens, load.heads, load.dim).to(load.dtype)
    ways = [_way(device, step, caches, queries) for device in (CpuDevice(native.library()), CpuDevice())]
    return Measured(load, *alternated(ways))


def _way(device: CpuDevice, step: Batch, caches: Sequence[LayerCache], queries: torch.Tensor) -> Call:
    over = device.block_attention(step, caches[0])
    return lambda number: over.attend(queries, caches[number % len(caches)], queries.shape[2] ** -0.5)


def _laid_out(load: Load) -> tuple[list[LayerCache], Batch]:
    """Layers of a cache, and a step over their blocks."""
    per_sequence = -(-load.context // load.block_size)
    num_layers = max(1, min(_MAX_LAYERS, _CACHES_BYTES // load.bytes_read))
    shape = load.batch * per_sequence, num_layers, 2, load.kv_heads, load.block_size, load.dim
    pool = Pool(shape[0], math.prod(shape[1:]) * load.dtype.itemsize, shared=False)  # as a decode node has it
    kept = torch.frombuffer(pool.data, dtype=load.dtype).view(shape).normal_()
    order = np.random.default_rng(0).permutation(shape[0]).reshape(load.batch, per_sequence)
    parts = [Part([0] * load.chunk, load.context - load.chunk, blocks.tolist()) for blocks in order]
    return [LayerCache(kept[:, layer].unbind(1)) for layer in range(num_layers)], Batch.build(parts)
