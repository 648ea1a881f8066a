"""Llama 2 and 3: the plain decoder; what differs from checkpoint to checkpoint (tied head, biases, rope scaling) is in the spec."""

from __future__ import annotations

from baton.engine.layers import Block, Decoder, Mlp
from baton.engine.setting import Setting


def llama(setting: Setting) -> Decoder:
    """Dense blocks throughout."""
    return Decoder(setting, [Block(setting, Mlp(setting)) for _ in range(setting.spec.num_layers)])
