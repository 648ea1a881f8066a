"""Attention over blocks on the cpu: into them, and over them by compiled kernels or by torch. Knows neither in detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from baton.engine.batch import Batch
from baton.engine.devices import HeadNorms, LatentNorm, LayerCache
from baton.engine.devices.cpu_elementwise import Elementwise
from baton.engine.devices.cpu_gathered import GatheredAttention
from baton.engine.devices.cpu_native_attention import AttentionKernels, NativeAttention
from baton.engine.devices.cpu_plan import Contexts
from baton.engine.devices.cpu_slots import Slots


class OverBlocks(Protocol):
    """The part of BlockAttention that the cpu has twice."""

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor: ...

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor: ...


class CpuBlockAttention:
    """Implements baton.engine.devices.BlockAttention. What `attend` gives is valid until it is called again."""

    def __init__(self, batch: Batch, like: LayerCache, small: Elementwise, kernels: AttentionKernels | None) -> None:
        self._small, self._slots = small, Slots(batch, like)
        self._over = _over_blocks(Contexts.of(batch), like, kernels)

    def enter(self, qkv: torch.Tensor, norms: HeadNorms | None, cos: torch.Tensor, sin: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        return self._small.enter(qkv, norms, cos, sin, self._slots, cache)

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
        return self._small.enter_latent(queries, compressed, norm, cos, sin, interleaved, self._slots, cache)

    def write(self, parts: Sequence[torch.Tensor], cache: LayerCache) -> None:
        self._slots.write(parts, cache)

    def attend(self, queries: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        return self._over.attend(queries, cache, scale)

    def attend_latent(
        self, queries: torch.Tensor, key_up: torch.Tensor, value_up: torch.Tensor, cache: LayerCache, scale: float
    ) -> torch.Tensor:
        return self._over.attend_latent(queries, key_up, value_up, cache, scale)


def _over_blocks(contexts: Contexts, like: LayerCache, kernels: AttentionKernels | None) -> OverBlocks:
    if kernels is not None and kernels.takes(like.parts[0].dtype):
        return NativeAttention(kernels, contexts, like)
    return GatheredAttention(contexts, like)
