"""The rotary settings of a config.json -> RopeSpec. Knows names and defaults of transformers, no formula of frequencies (rotary.py).

transformers 5 writes `rope_parameters` with the theta inside; older versions and the hub `rope_theta` and maybe `rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from baton.engine.config_json.fields import MOST, Config, Fields
from baton.engine.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling
from baton.errors import ConfigError

ROPE_TYPES = ("default", "llama3", "yarn", "linear")


def rope_spec(config: Config, dim: int, interleaved: bool = False) -> RopeSpec:
    """The rope of a model that rotates `dim` widths of every head. Raises ConfigError for what rotary.py cannot compute."""
    rope = _settings(config)
    kind = _kind(rope)
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    partial = Fields(rope).number("partial_rotary_factor", Fields(config).number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor={partial} is not supported; the whole head is rotated")
    if dim % 2:
        raise ConfigError(f"rope rotates pairs, and the rotated width of a head is odd: {dim}")
    theta = Fields(rope).number("rope_theta", Fields(config).number("rope_theta", 10000.0))
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta={theta:g} must be above 1")
    return RopeSpec(theta, _scaling(kind, rope, config), interleaved)


def max_positions(config: Config, rope: RopeSpec, default: int) -> int:
    """The longest context in tokens: max_position_embeddings, or with YaRN original positions x factor where that is more.

    That is what people mean who add a yarn `rope_scaling` to a checkpoint and leave max_position_embeddings (Qwen2.5's and Qwen3's
    cards tell them to), and what vLLM does. With `linear` and `llama3` the checkpoint's number already is the stretched one.
    """
    plain = Fields(config).count("max_position_embeddings", default)
    if not isinstance(rope.scaling, YarnScaling):
        return plain
    original, factor = rope.scaling.original_positions, rope.scaling.factor
    if original * factor > MOST:
        raise ConfigError(f"rope type yarn: original_max_position_embeddings={original} x factor={factor:g} must be at most {MOST}")
    return max(plain, int(original * factor))


def latent_softmax_scale(config: Config, query_dim: int, rope: RopeSpec) -> float:
    """1 / sqrt(query_dim), times mscale² where the rope is stretched and names mscale_all_dim (yarn_apply_mscale in DeepSeek's models)."""
    plain, settings = float(query_dim**-0.5), _settings(config)
    all_dims = Fields(settings).number("mscale_all_dim", 0.0)
    if rope.scaling is None or not all_dims:
        return plain
    mscale = _mscale(rope.scaling.factor, all_dims)
    return plain * mscale * mscale


def _settings(config: Config) -> Config:
    # In this order: transformers takes an old rope_scaling, where there is one, for the whole of rope_parameters.
    settings = Fields(config).inner("rope_scaling") or Fields(config).inner("rope_parameters")
    if nested := [key for key, value in settings.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"rope settings by kind of layer ({', '.join(nested)}) are not supported; all layers must have the same")
    return settings


def _kind(rope: Config) -> object:
    return rope.get("rope_type") or rope.get("type") or "default"


def _scaling(kind: object, rope: Config, config: Config) -> Llama3Scaling | YarnScaling | LinearScaling | None:
    if kind == "llama3":
        return _llama3(Fields(rope), _original_positions(rope, config))
    if kind == "yarn":
        return _yarn(rope, config)
    return LinearScaling(Fields(rope).positive("factor")) if kind == "linear" else None


def _llama3(rope: Fields, original: int) -> Llama3Scaling:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        raise ConfigError(f"rope type llama3: high_freq_factor={high:g} must be above low_freq_factor={low:g}")
    return Llama3Scaling(rope.positive("factor"), low, high, original)


def _yarn(rope: Config, config: Config) -> YarnScaling:
    fields, original = Fields(rope), _original_positions(rope, config)
    stated_as_null = "factor" in rope and rope["factor"] is None
    factor = fields.positive("factor", Fields(config).count("max_position_embeddings") / original if stated_as_null else None)
    # 0 means the default, too: transformers writes `or 32`.
    fast, slow = fields.number("beta_fast", 32.0) or 32.0, fields.number("beta_slow", 1.0) or 1.0
    if not fast >= slow > 0:
        raise ConfigError(f"rope type yarn: beta_fast={fast:g} must be at least beta_slow={slow:g}, and both above 0")
    return YarnScaling(factor, original, fast, slow, _attention_factor(fields, factor), fields.flag("truncate", True))


def _attention_factor(rope: Fields, factor: float) -> float:
    """As given, else by the paper, or as the ratio of two such factors where mscale and mscale_all_dim are named."""
    if rope.given("attention_factor"):
        return rope.positive("attention_factor")
    numerator, denominator = rope.number("mscale", 0.0, 0.0), rope.number("mscale_all_dim", 0.0, 0.0)
    if numerator and denominator:
        return _mscale(factor, numerator) / _mscale(factor, denominator)
    return _mscale(factor)


def _mscale(factor: float, weight: float = 1.0) -> float:
    """https://arxiv.org/abs/2309.00071, section 3.4: how much sharper attention must be when positions are stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _original_positions(rope: Config, config: Config) -> int:
    """A field of config.json itself wins over the one within the rope settings, as in transformers."""
    for fields in (Fields(config), Fields(rope)):
        if fields.given("original_max_position_embeddings"):
            return fields.count("original_max_position_embeddings")
    if not Fields(config).given("max_position_embeddings"):
        raise ConfigError(f"rope type {_kind(rope)} needs original_max_position_embeddings in config.json")
    return Fields(config).count("max_position_embeddings")
