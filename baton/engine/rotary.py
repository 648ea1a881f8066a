"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the ways to stretch it, by the formulas of transformers.

Every formula keeps the order of operations of transformers' modeling_rope_utils, so that frequencies are equal to the last bit.
"""

from __future__ import annotations

import math

import torch

from baton.engine.setting import Setting
from baton.engine.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling

_TABLE_LEN = 4096  # angles of so many positions are kept: looking them up takes a fourth of the time


class Rotary:
    """Angles of positions, found once per step: the first ones in a table, for later ones computed."""

    def __init__(self, setting: Setting) -> None:
        rope, like = setting.spec.rope, setting.empty(0)
        self._dtype = like.dtype
        self._frequencies = rotary_frequencies(rope, setting.spec.rope_dim).to(like.device)
        self._factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
        self._table_len = min(_TABLE_LEN, setting.spec.max_position_embeddings)
        self._cos, self._sin = self._angles(torch.arange(self._table_len, device=like.device))

    def __call__(self, positions: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] -> cos, sin, each [T, 1, rope_dim / 2] in the model's dtype; angles and attention factor are float32.

        largest: none of the positions is greater; told, for looking at them would wait for the device.
        """
        if largest >= self._table_len:
            return self._angles(positions)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None, None].float() * self._frequencies
        return (angles.cos() * self._factor).to(self._dtype), (angles.sin() * self._factor).to(self._dtype)


def rotary_frequencies(rope: RopeSpec, dim: int) -> torch.Tensor:
    """Inverse frequencies [dim / 2], float32 on the host."""
    periods = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    if isinstance(rope.scaling, YarnScaling):
        return _yarn(periods, rope.scaling, rope.theta, dim)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3(1.0 / periods, rope.scaling)
    return 1.0 / periods / rope.scaling.factor if isinstance(rope.scaling, LinearScaling) else 1.0 / periods


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    wave_lens = 2 * math.pi / plain
    longest_kept = scaling.original_positions / scaling.high_freq_factor
    shortest_slowed = scaling.original_positions / scaling.low_freq_factor
    smooth = (scaling.original_positions / wave_lens - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    kept_or_slowed = torch.where(wave_lens > shortest_slowed, plain / scaling.factor, plain)
    return torch.where((wave_lens >= longest_kept) & (wave_lens <= shortest_slowed), between, kept_or_slowed)


def _yarn(periods: torch.Tensor, scaling: YarnScaling, theta: float, dim: int) -> torch.Tensor:
    """Dimensions that turn often within the original context are kept, those that turn less than once slowed, a ramp between."""
    low, high = _correction_range(scaling, theta, dim)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _correction_range(scaling: YarnScaling, theta: float, dim: int) -> tuple[float, float]:
    """The dimensions between which the ramp lies; they are never equal."""
    low, high = (_turning(rotations, scaling.original_positions, theta, dim) for rotations in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _turning(rotations: float, positions: int, theta: float, dim: int) -> float:
    """The dimension, as a real number, that turns `rotations` times within `positions`."""
    return (dim * math.log(positions / (rotations * 2 * math.pi))) / (2 * math.log(theta))
