"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the ways to stretch it, by the formulas of transformers."""

from __future__ import annotations

import math

import torch

from baton.engine.setting import Setting
from baton.engine.spec import Llama3Scaling, RopeSpec


class Rotary:
    """Angles of positions, computed once per step."""

    def __init__(self, setting: Setting) -> None:
        dim = setting.spec.rope_dim
        self._dtype = setting.empty(0).dtype
        self._frequencies = rotary_frequencies(setting.spec.rope, dim)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] -> cos, sin, each [T, 1, D / 2] in the model's dtype; angles are float32."""
        angles = positions[:, None, None].float() * self._frequencies.to(positions.device)
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)


def rotary_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2], float32 on the host."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    return _llama3(plain, rope.scaling) if isinstance(rope.scaling, Llama3Scaling) else plain


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated (transformers, modeling_rope_utils)."""
    wave_lens = 2 * math.pi / plain
    longest_kept = scaling.original_positions / scaling.high_freq_factor
    shortest_slowed = scaling.original_positions / scaling.low_freq_factor
    slowed = plain / scaling.factor
    smooth = (scaling.original_positions / wave_lens - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * slowed + smooth * plain
    kept_or_slowed = torch.where(wave_lens > shortest_slowed, slowed, plain)
    return torch.where((wave_lens >= longest_kept) & (wave_lens <= shortest_slowed), between, kept_or_slowed)
