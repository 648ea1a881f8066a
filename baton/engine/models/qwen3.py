"""Qwen3: a plain decoder that normalises queries and keys per head."""

from __future__ import annotations

from baton.engine.layers import Block, Decoder, Mlp
from baton.engine.setting import Setting


def qwen3(setting: Setting) -> Decoder:
    """Dense blocks throughout."""
    assert setting.spec.qk_norm
    return Decoder(setting, [Block(setting, Mlp(setting)) for _ in range(setting.spec.num_layers)])
