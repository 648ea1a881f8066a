"""The device seam: the operations that models are written against, and nothing else. One module per device implements it.

Shapes: T tokens of a step, H hidden width, D head_dim, S sequences, N rows. Tensors live on the device; activations, weights and KV cache
share the model's dtype unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import Store

from baton.engine.batch import Batch
from baton.engine.spec import GateSpec
from baton.errors import ConfigError

DEVICES = ("cpu",)


@dataclass(frozen=True, slots=True)
class Packed:
    """What a matrix was before a device packed it: shape [..., out, in], dtype, and whether it was packed as `gated`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Weights of a linear map, [..., out, in].

    values: in the model's dtype, or int8. scales: [..., out] float32 where values are int8, whose meaning then is values * scales;
    None otherwise. Indexing the leading axes (an expert, a run of rows) indexes both. packed: None, or what the matrix was before
    `Device.prepare`: then only that device can read the values, and they cannot be indexed.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    packed: Packed | None = None

    def __getitem__(self, index: int | slice) -> Matrix:
        assert self.packed is None
        return Matrix(self.values[index], None if self.scales is None else self.scales[index])

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """One layer of the cache: views of the node's buffer, one per part, [num_blocks, num_kv_heads, block_size, part_dim].

    Keys and values for grouped-query attention; for latent attention what the device keeps (one part of latent + rope on cpu).
    """

    parts: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """Root-mean-square norms of single heads: weights [D] of queries and of keys, in the model's dtype."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class LatentNorm:
    """The root-mean-square norm of a latent: weight [latent] in the model's dtype."""

    weight: torch.Tensor
    eps: float


class BlockAttention(Protocol):
    """Attention of one step over blocks: prefill chunks and decode rows in one call. Made once per step, used by every layer."""

    def enter(self, qkv: torch.Tensor, norms: HeadNorms | None, cos: torch.Tensor, sin: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """Take apart a fused projection [T, (num_heads + 2 * num_kv_heads) * D] of queries, keys and values -> queries [T, num_heads, D].

        Queries and keys are normalised if there are norms, then rotated as by Device.rotate (not interleaved); keys and values go
        into the step's slots. cos, sin: [T, 1, D / 2].
        """
        ...

    def enter_latent(
        self,
        queries: torch.Tensor,
        compressed: torch.Tensor,
        norm: LatentNorm,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Queries [T, num_heads, nope + rope] -> the same with their last `rope` rotated, and latents into the step's slots.

        compressed: [T, latent + rope], the first of which are normalised, the others rotated as by Device.rotate. cos, sin:
        [T, 1, rope / 2].
        """
        ...

    def write(self, parts: Sequence[torch.Tensor], cache: LayerCache) -> None:
        """Store what the step adds, each part [T, num_kv_heads, part_dim], into its slots."""
        ...

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        """Causal attention of queries [T, num_heads, D] over everything their sequences have in the cache -> [T, num_heads * D].

        The step's own keys and values must have been written. Scores are multiplied by scale; query head h reads KV head
        h // (num_heads / num_kv_heads).
        """
        ...

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        """Causal latent attention of queries [T, num_heads, nope + rope] -> [T, num_heads * value].

        The cache holds per token [latent | rotated key of rope]. A head's key is [key_up[h] @ latent | rotated key], its value
        value_up[h] @ latent; key_up: [num_heads, nope, latent], value_up: [num_heads, value, latent]. The device chooses, sequence
        by sequence, whether to expand cached latents (long chunks) or to absorb key_up into the query and value_up into the result
        (decode): https://arxiv.org/abs/2405.04434, section 2.1.2.
        """
        ...


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> bool:
        """Block until it is done. Raises RuntimeError when a peer is gone or the group's timeout has passed."""
        ...


class Collectives(Protocol):
    """What Baton uses of a process group: the part that torch's gloo, NCCL and HCCL backends share."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work:
        """Sum in place over all ranks."""
        ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work:
        """Rank i's input becomes outputs[0][i] everywhere."""
        ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> Work:
        """Copy root's tensor to all."""
        ...

    def alltoall_base(self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]) -> Work:
        """Send input_splits[i] rows to rank i, receive output_splits[i] rows from it."""
        ...

    def shutdown(self) -> None:
        """Close the connections."""
        ...


class Device(Protocol):
    """One kind of device. Stateless apart from what the driver keeps."""

    def set_num_threads(self, num_threads: int) -> None:
        """How many host threads operations of this process may use."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        """Uninitialised memory; dtype by its torch name: the model's, int8 or float32."""
        ...

    def tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        """A copy of a host array; integers become int64, whatever their width."""
        ...

    def collectives(self, store: Store, rank: int, size: int, bind: str, timeout_s: float) -> Collectives:
        """Join a process group of this device's kind. bind: own address. Raises RuntimeError if the others do not come."""
        ...

    def block_attention(self, batch: Batch, like: LayerCache) -> BlockAttention:
        """Prepare attention for one step over layers whose caches have the shape and strides of `like`."""
        ...

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        """Rows of table [n, H] for ids [T] in first_id … first_id + n - 1, zeros for other ids -> [T, H]."""
        ...

    def prepare(self, weight: Matrix, gated: bool = False) -> Matrix:
        """The same weights in the form that this device multiplies fastest: called once, after loading, in place of the original.

        gated: its outputs are a gate's, then as many of what it gates; it is for `gated_linear` and `experts` alone.
        """
        ...

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in] @ weight [out, in] transposed (+ bias [out]) -> [N, out], in x's dtype.

        For int8 weights x is quantized per row to int8, symmetrically (scale = max |x| / 127), products add up in int32.
        """
        ...

    def gated_linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu_mul(linear(x, weight, bias)), for weights [2 * width, in] that may have been prepared as gated -> [N, width]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last axis, computed in float32 (https://arxiv.org/abs/1910.07467)."""
        ...

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [N, H] -> (norm of their sum, their sum). residual is given up: the sum may lie in its memory."""
        ...

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        """Rotary embedding of x [T, heads, D]; cos, sin: [T, 1, D / 2], x's dtype.

        Pair i of x is (i, i + D / 2), or if interleaved (2i, 2i + 1); of the result it is (i, i + D / 2) either way, as in
        transformers' apply_rotary_pos_emb and apply_rotary_pos_emb_interleave: what is cached must mean the same on all devices.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, for [N, 2 * width] holding gate beside up -> [N, width]."""
        ...

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The id of the largest of each row [N, V], of equal ones the lowest -> int64 [N], and whether there is one, bool [N].

        There is none where the row holds a NaN or its largest is infinite; the id is then a valid one and means nothing.
        """
        ...

    def draw(self, logits: torch.Tensor, top_ids: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """An id of each row [N, V] by the probabilities softmax(logits / temperature) -> int64 [N].

        It is the first whose cumulative probability exceeds the row's uniform, and never one of probability 0. top_ids [N]: what argmax
        found. temperatures, uniforms: [N] float32, above 0, and in [0, 1) in multiples of 2**-24.
        """
        ...

    def route(self, logits: torch.Tensor, gate: GateSpec, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token by `gate` from logits [T, num_experts] -> weights [T, top_k] float32, ids [T, top_k] int64.

        bias: [num_experts] float32, added to scores for the choice alone; there if gate.biased.
        """
        ...

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
        """Weighted sum of gated MLPs: x [N, H], weights and ids [N, top_k], gate_up [E, 2 * width, H], down [E, H, width] -> [N, H].

        Ids outside 0 … E - 1 belong to other ranks and add nothing. weights are float32: an expert's output is multiplied in float32,
        rounded to x's dtype, and added up in that, in order of expert id, as in transformers.
        """
        ...


def open_device(name: str) -> Device:
    """The device of this name, initialised. Raises ConfigError, listing the known ones."""
    if name == "cpu":
        from baton.engine.devices import native
        from baton.engine.devices.cpu import CpuDevice

        return CpuDevice(native.library())
    raise ConfigError(f"device {name!r} is not supported; supported are {', '.join(DEVICES)}")
