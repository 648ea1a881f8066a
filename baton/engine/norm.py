"""Normalisation. Knows the device seam."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton.engine.setting import Setting
from baton.engine.weights import Piece


class RMSNorm:
    """Root-mean-square norm over the last axis, replicated. eps: the model's if not given."""

    def __init__(self, setting: Setting, width: int, eps: float | None = None) -> None:
        self._device, self._eps = setting.device, setting.spec.norm_eps if eps is None else eps
        self.weight = setting.empty(width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._device.rms_norm(x, self.weight, self._eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, H] -> (norm of their sum, their sum). residual is given up; without one x is the sum."""
        return (self(x), x) if residual is None else self._device.add_rms_norm(x, residual, self.weight, self._eps)

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight, all of it."""
        yield Piece(f"{name}.weight", tuple(self.weight.shape), (slice(None),), self.weight)
