"""DeepSeek-V2 and V2-Lite: latent attention, softmax-gated experts beside shared ones after a few dense layers."""

from __future__ import annotations

from baton.engine.layers import Block, Decoder, Mlp
from baton.engine.mla import Mla
from baton.engine.moe import Moe
from baton.engine.setting import Setting


def deepseek_v2(setting: Setting) -> Decoder:
    """Experts where the spec says so, dense MLPs elsewhere. The router computes in float32."""
    sparse = [setting.spec.sparse(layer) for layer in range(setting.spec.num_layers)]
    feed_forwards = [Moe(setting, float32_router=True) if routed else Mlp(setting) for routed in sparse]
    return Decoder(setting, [Block(setting, feed_forward, Mla(setting)) for feed_forward in feed_forwards])
