"""The latent attention of a DeepSeek config.json -> MlaSpec. Knows names and defaults, no tensors."""

from __future__ import annotations

from baton.engine.config_json.fields import Config, Fields
from baton.engine.spec import MlaSpec
from baton.errors import ConfigError


def mla_spec(config: Config) -> MlaSpec:
    """Widths as given, else DeepSeek-V3's, which are the defaults of both classes. q_lora_rank: null means none. Raises ConfigError."""
    fields, heads = Fields(config), Fields(config).count("num_attention_heads")
    if (kv_heads := fields.count("num_key_value_heads", heads)) != heads:
        raise ConfigError(f"latent attention has as many key as query heads: num_key_value_heads={kv_heads}, num_attention_heads={heads}")
    no_query_rank = "q_lora_rank" in config and config["q_lora_rank"] is None
    return MlaSpec(
        query_rank=None if no_query_rank else fields.count("q_lora_rank", 1536),
        latent=fields.count("kv_lora_rank", 512),
        nope=fields.count("qk_nope_head_dim", 128),
        rope=fields.count("qk_rope_head_dim", 64),
        value=fields.count("v_head_dim", 128),
    )
