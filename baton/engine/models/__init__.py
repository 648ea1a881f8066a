"""Which model a spec asks for. Models only assemble layers; every one is written once, against the device seam."""

from __future__ import annotations

from baton.engine.layers import Decoder
from baton.engine.models.deepseek_v2 import deepseek_v2
from baton.engine.models.deepseek_v3 import deepseek_v3
from baton.engine.models.llama import llama
from baton.engine.models.qwen2 import qwen2
from baton.engine.models.qwen3 import qwen3
from baton.engine.models.qwen3_moe import qwen3_moe
from baton.engine.setting import Setting

_BUILDERS = (llama, qwen2, qwen3, qwen3_moe, deepseek_v2, deepseek_v3)


def build_model(setting: Setting) -> Decoder:
    """The model of setting.spec with uninitialised parameters. Raises ConfigError if it cannot be split as asked."""
    return next(builder for builder in _BUILDERS if builder.__name__ == setting.spec.model_type)(setting)
