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
from baton.errors import ConfigError

DEVICES = ("cpu",)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """One layer of the cache. kv: [num_blocks, 2, num_kv_heads, block_size, head_dim], a view of the node's buffer."""

    kv: torch.Tensor

    @property
    def keys(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_dim]"""
        return self.kv[:, 0]

    @property
    def values(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_dim]"""
        return self.kv[:, 1]


class BlockAttention(Protocol):
    """Attention of one step over blocks: prefill chunks and decode rows in one call. Made once per step, used by every layer."""

    def write(self, keys: torch.Tensor, values: torch.Tensor, cache: LayerCache) -> None:
        """Store the step's keys and values, each [T, num_kv_heads, D], into their slots."""
        ...

    def attend(self, queries: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """Causal attention of queries [T, num_heads, D] over everything their sequences have in the cache -> [T, num_heads * D].

        The step's own keys and values must have been written. Scores are scaled by D ** -0.5; query head h reads KV head
        h // (num_heads / num_kv_heads).
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

    @property
    def name(self) -> str:
        """The word in the configuration."""
        ...

    def set_num_threads(self, num_threads: int) -> None:
        """How many host threads operations of this process may use."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        """Uninitialised memory; dtype by its torch name."""
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

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in] @ weight [out, in] transposed (+ bias [out]) -> [N, out]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last axis, computed in float32 (https://arxiv.org/abs/1910.07467)."""
        ...

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x [T, heads, D] in the half-split form of transformers; cos, sin: [T, 1, D / 2], x's dtype."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, for [N, 2 * width] holding gate beside up -> [N, width]."""
        ...

    def route(self, logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The top_k experts by softmax of logits [T, num_experts], in float32 -> weights [T, top_k] in logits' dtype, ids int64.

        normalize: weights of a token sum to one.
        """
        ...

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Weighted sum of gated MLPs: x [N, H], weights and ids [N, top_k], gate_up [E, 2 * width, H], down [E, H, width] -> [N, H].

        Ids outside 0 … E - 1 belong to other ranks and add nothing. Tokens add up in order of expert id, as in transformers.
        """
        ...


def open_device(name: str) -> Device:
    """The device of this name, initialised. Raises ConfigError, listing the known ones."""
    if name == "cpu":
        from baton.engine.devices.cpu import CpuDevice

        return CpuDevice()
    raise ConfigError(f"device {name!r} is not supported; supported are {', '.join(DEVICES)}")
