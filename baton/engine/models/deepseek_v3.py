"""DeepSeek-V3 and R1: V2's layers; what is new, sigmoid gates with a bias within groups, and how rope pairs lie, is in the spec."""

from __future__ import annotations

from baton.engine.layers import Decoder
from baton.engine.models.deepseek_v2 import deepseek_v2
from baton.engine.setting import Setting


def deepseek_v3(setting: Setting) -> Decoder:
    """As deepseek_v2, on whose builder it rests: the difference is data."""
    return deepseek_v2(setting)
