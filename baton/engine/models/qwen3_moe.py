"""Qwen3-MoE: Qwen3's attention with routed experts in most layers."""

from __future__ import annotations

from baton.engine.layers import Block, Decoder, Mlp
from baton.engine.moe import Moe
from baton.engine.setting import Setting


def qwen3_moe(setting: Setting) -> Decoder:
    """Experts where the spec says so, dense MLPs elsewhere."""
    sparse = [setting.spec.sparse(layer) for layer in range(setting.spec.num_layers)]
    return Decoder(setting, [Block(setting, Moe(setting) if routed else Mlp(setting)) for routed in sparse])
