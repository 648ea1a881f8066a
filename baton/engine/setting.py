"""What layers are built with, and what they share during one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from baton.engine.devices import BlockAttention, Device, LayerCache, Matrix
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What every layer of a rank is built with."""

    spec: ModelSpec
    placement: Placement
    groups: Groups
    device: Device

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for a parameter, in the model's dtype."""
        return self.device.empty(shape, self.spec.dtype)

    def matrix(self, *shape: int) -> Matrix:
        """Memory for the weights [..., out, in] of a linear map: quantized if the model is."""
        if self.spec.quantization is None:
            return Matrix(self.empty(*shape))
        return Matrix(self.device.empty(shape, "int8"), self.device.empty(shape[:-1], "float32"))


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Some of a step's rows: all that a layer has to compute, once it has written the keys and values of the others, too.

    rows: [N] int64, of T. attention: theirs alone, each over its own context.
    """

    rows: torch.Tensor
    attention: BlockAttention


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What the layers share during one forward. token_ids: [T] int64; cos, sin: [T, 1, rope_dim / 2]; caches: one per layer.

    wanted: the rows that matter after the last layer, None for all. between_layers: called before each layer, on the thread that computes.
    """

    token_ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    attention: BlockAttention
    caches: Sequence[LayerCache]
    wanted: Wanted | None
    between_layers: Callable[[], None]
