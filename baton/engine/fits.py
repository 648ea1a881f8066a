"""Whether a model can be shared out among the ranks of a node, and what a KV block takes there, before there is any.

Pure; knows no tensors, files or processes.
"""

from __future__ import annotations

from typing import Literal

from baton.engine.placement import Placement
from baton.engine.spec import ModelSpec
from baton.errors import ConfigError

Role = Literal["prefill", "decode"]
SplitMoe = Literal["experts", "tensor"]


def place(spec: ModelSpec, role: Role, rank: int, tp_size: int, dp_size: int = 1, moe: SplitMoe = "experts") -> Placement:
    """Where rank number `rank` of a node stands: decode with experts is coupled, prefill may split every expert (moe: tensor)."""
    coupled = role == "decode" and spec.moe is not None
    return Placement.of(rank, tp_size, dp_size, coupled, split_experts=role == "prefill" and moe == "tensor")


def check_node(spec: ModelSpec, role: Role, tp_size: int, dp_size: int = 1, moe: SplitMoe = "experts") -> None:
    """Raise ConfigError, with the numbers and the node's shape, if some rank of such a node cannot have an equal share."""
    for rank in range(tp_size * dp_size):
        try:
            check_divides(spec, place(spec, role, rank, tp_size, dp_size, moe))
        except ConfigError as error:
            shape = f"dp={dp_size} x tp={tp_size}" if role == "decode" else f"tp={tp_size}"
            raise ConfigError(f"{spec.model_type} cannot be shared out on a {role} node of {shape}: {error.message}") from error


def check_divides(spec: ModelSpec, placement: Placement) -> None:
    """Raise ConfigError if heads, MLPs or experts do not divide as the layers will ask for at this place."""
    placement.heads(spec.heads)
    placement.kv_heads(spec.kv_heads)
    sparse = [spec.sparse(layer) for layer in range(spec.num_layers)]
    if not all(sparse):
        placement.columns(spec.intermediate)
    if spec.moe is not None and any(sparse):
        placement.experts(spec.moe.num_experts)
        placement.expert_columns(spec.moe.intermediate)
        placement.columns(spec.moe.shared_intermediate, "n_shared_experts * moe_intermediate_size")
