"""Where each rank of a node stands in it, and how its KV cache lies: what the ranks know of each other without asking. Pure.

Here the engine's idea of a block (KVShape) becomes the one that peers compare (KVLayout).
"""

from __future__ import annotations

from baton.config import RankPlan
from baton.engine.fits import place
from baton.engine.kv_shape import AXES, KVShape
from baton.engine.placement import Placement
from baton.engine.spec import ModelSpec
from kv_transfer.layout import KVLayout


def placement_of(plan: RankPlan, spec: ModelSpec, rank: int) -> Placement:
    """Where rank number `rank` of the plan's node stands."""
    return place(spec, plan.role, rank, plan.tp_size, plan.dp_size, plan.config.prefill.moe)


def node_layouts(plan: RankPlan, spec: ModelSpec, num_blocks: int) -> tuple[KVLayout, ...]:
    """Of all ranks of the plan's node, by number. num_blocks: of each, since all have the same memory for equally large blocks."""
    return tuple(_layout(spec, placement_of(plan, spec, rank), plan.config.block_size, num_blocks) for rank in range(plan.num_ranks))


def _layout(spec: ModelSpec, placement: Placement, block_size: int, num_blocks: int) -> KVLayout:
    shape = KVShape.of(spec, placement, block_size)
    return KVLayout(
        axes=AXES,
        num_blocks=num_blocks,
        block_size=shape.block_size,
        layer_start=0,
        num_layers=shape.num_layers,
        part_dims=shape.part_dims,
        head_start=shape.head_start,
        num_heads=shape.num_heads,
        dtype=shape.dtype,
        model_num_layers=spec.num_layers,
        model_num_kv_heads=spec.kv_heads,
    )
