"""Qwen2 and Qwen2.5: a plain decoder with biases on queries, keys and values."""

from __future__ import annotations

from baton.engine.layers import Block, Decoder, Mlp
from baton.engine.setting import Setting


def qwen2(setting: Setting) -> Decoder:
    """Dense blocks throughout."""
    assert setting.spec.qkv_bias
    return Decoder(setting, [Block(setting, Mlp(setting)) for _ in range(setting.spec.num_layers)])
