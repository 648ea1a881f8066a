"""What one rank keeps of every KV block, as plain numbers: how large a block is before there is any memory. Pure; no tensors.

Storage order is block-major, as AXES says, so that all a rank holds of one block is one span.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.placement import Placement
from baton.engine.spec import ModelSpec

AXES = ("block", "layer", "part", "head", "slot", "dim")


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one rank keeps of every block: heads head_start … head_start + num_heads - 1 of all layers.

    part_dims: widths of what is kept per token and head: K and V, or one latent. Within a layer, parts lie one after the other.
    """

    num_layers: int
    head_start: int
    num_heads: int
    block_size: int
    part_dims: tuple[int, ...]
    dtype: str
    dtype_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, placement: Placement, block_size: int) -> KVShape:
        """The shape on one rank; ranks beyond the number of KV heads hold replicas."""
        heads = placement.kv_heads(spec.kv_heads)
        return cls(spec.num_layers, heads.start, len(heads), block_size, spec.part_dims, spec.dtype, spec.dtype_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on this rank."""
        return self.num_layers * self.num_heads * self.block_size * sum(self.part_dims) * self.dtype_bytes
