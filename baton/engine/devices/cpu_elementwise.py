"""What lies between matrix products, in plain torch: the reference. Functions behind CpuDevice; see baton.engine.devices for shapes.

cpu_kernels.py computes the same with compiled kernels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from baton.engine import sampler
from baton.engine.devices import HeadNorms, LatentNorm, LayerCache
from baton.engine.devices.cpu_slots import Slots


class Elementwise(Protocol):
    """The operations that the cpu has twice. Each is that of Device with the same name, those that enter are of BlockAttention."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor: ...

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def draw(self, logits: torch.Tensor, top_ids: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor: ...

    def enter(
        self, qkv: torch.Tensor, norms: HeadNorms | None, cos: torch.Tensor, sin: torch.Tensor, slots: Slots, cache: LayerCache
    ) -> torch.Tensor: ...

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
    ) -> torch.Tensor: ...


class TorchElementwise:
    """Implements Elementwise for every dtype."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return self.rms_norm(total, weight, eps), total

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def embed(self, ids: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        local = ids - first_id
        mine = (local >= 0) & (local < len(table))
        if bool(mine.all()):
            return functional.embedding(local, table)
        rows = torch.zeros((len(ids), table.shape[1]), dtype=table.dtype)
        rows[mine] = table[local[mine]]
        return rows

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sampler.argmax(logits)

    def draw(self, logits: torch.Tensor, top_ids: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return sampler.draw(logits, top_ids, temperatures, uniforms)

    def enter(
        self, qkv: torch.Tensor, norms: HeadNorms | None, cos: torch.Tensor, sin: torch.Tensor, slots: Slots, cache: LayerCache
    ) -> torch.Tensor:
        num_kv_heads, dim = slots.num_kv_heads, slots.dim
        heads = qkv.view(len(qkv), qkv.shape[1] // dim, dim)
        queries, keys, values = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            queries, keys = self.rms_norm(queries, norms.query, norms.eps), self.rms_norm(keys, norms.key, norms.eps)
        slots.write((self.rotate(keys, cos, sin), values), cache)
        return self.rotate(queries, cos, sin)

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
        latent = len(norm.weight)
        latents, keys = self.rms_norm(compressed[:, :latent], norm.weight, norm.eps), compressed[:, None, latent:]
        keys = self.rotate(keys, cos, sin, interleaved)
        slots.write((torch.cat((latents[:, None], keys), dim=-1),), cache)
        plain = queries.shape[2] - keys.shape[2]
        return torch.cat((queries[..., :plain], self.rotate(queries[..., plain:], cos, sin, interleaved)), dim=-1)
