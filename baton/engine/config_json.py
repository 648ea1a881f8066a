"""config.json -> ModelSpec: checked and completed. Knows no tensors and no devices.

Field names and defaults are those of the `transformers` configuration classes: what a checkpoint on the hub may leave out
has the default of its class, anything that would change the computation in a way Baton does not implement is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.engine.spec import DTYPE_BYTES, GateSpec, Llama3Scaling, ModelSpec, MoeSpec, RopeSpec
from baton.errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_DTYPE_ALIASES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_ROPE_TYPES = ("default", "llama3")
_MAX_POSITIONS = {"llama": 2048}

Config = Mapping[str, Any]


def load_spec(model_dir: Path | str, dtype: str = "auto", quantization: str = "auto") -> ModelSpec:
    """Read `model_dir`/config.json. dtype: "auto" takes the checkpoint's, else float32, bfloat16, float16 or an alias.

    quantization: "auto" takes the checkpoint's, "none" refuses a quantized one that cannot be turned back, "w8a8" makes it so.

    Raises ConfigError, naming what is missing or not supported.
    """
    return spec_from_config(read_config(model_dir), dtype, quantization)


def read_config(model_dir: Path | str) -> dict[str, Any]:
    """config.json as it stands. Raises ConfigError if there is none or it is not a JSON object."""
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: --model must be a checkpoint directory as transformers saves it") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return config


def spec_from_config(config: Config, dtype: str = "auto", quantization: str = "auto") -> ModelSpec:
    """The spec that a parsed config.json describes. Pure; raises ConfigError."""
    model_type = _model_type(config)
    _refuse_unsupported(config)
    hidden, heads = _need_int(config, "hidden_size"), _need_int(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    head_dim = int(config.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads))
    spec = ModelSpec(
        model_type=model_type,
        num_layers=_need_int(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_need_int(config, "intermediate_size"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        vocab=_need_int(config, "vocab_size"),
        rope=_rope(config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias and model_type != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type.startswith("qwen3"),
        max_position_embeddings=int(config.get("max_position_embeddings", _MAX_POSITIONS.get(model_type, 32768))),
        dtype=_dtype(config, dtype),
        moe=_moe(config) if model_type == "qwen3_moe" else None,
        quantization="w8a8" if quantization == "w8a8" else None,
    )
    if spec.heads % spec.kv_heads:
        raise ConfigError(f"num_attention_heads={spec.heads} is no multiple of num_key_value_heads={spec.kv_heads}")
    return spec


def _model_type(config: Config) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    found = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    raise ConfigError(f"architecture {found} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(config: Config) -> None:
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ConfigError(f"hidden_act {act!r} is not supported; supported is silu")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ConfigError(f"quantization_config (quant_method {method!r}) is not supported; use an unquantised checkpoint")
    if config.get("use_sliding_window") and config.get("sliding_window") and _has_sliding_layer(config):
        raise ConfigError(f"sliding_window={config['sliding_window']} with use_sliding_window is not supported: attention is full here")


def _has_sliding_layer(config: Config) -> bool:
    kinds = config.get("layer_types")
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return int(config.get("max_window_layers", 0)) < _need_int(config, "num_hidden_layers")


def _rope(config: Config) -> RopeSpec:
    """transformers 5 writes `rope_parameters` with the theta inside, older versions `rope_theta` and maybe `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}")
    partial = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor={partial} is not supported; the whole head is rotated")
    return RopeSpec(theta, _llama3(rope, config) if kind == "llama3" else None)


def _llama3(rope: Config, config: Config) -> Llama3Scaling:
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    if original is None:
        raise ConfigError("rope type llama3 needs original_max_position_embeddings in config.json")
    low, high = _need_float(rope, "low_freq_factor"), _need_float(rope, "high_freq_factor")
    return Llama3Scaling(_need_float(rope, "factor"), low, high, int(original))


def _moe(config: Config) -> MoeSpec:
    num_layers = _need_int(config, "num_hidden_layers")
    num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 128)
    top_k = int(config.get("num_experts_per_tok", 8))
    if not 0 < top_k <= num_experts:
        raise ConfigError(f"num_experts_per_tok={top_k} must be between 1 and num_experts={num_experts}")
    dense, step = config.get("mlp_only_layers") or [], int(config.get("decoder_sparse_step", 1))
    return MoeSpec(
        num_experts=num_experts,
        intermediate=int(config.get("moe_intermediate_size", 768)),
        gate=GateSpec(top_k, normalize=bool(config.get("norm_topk_prob", False))),
        sparse_layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
    )


def _dtype(config: Config, asked: str) -> str:
    name = asked
    if asked == "auto":
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = _DTYPE_ALIASES.get(name, name).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype {name!r} is not supported; supported are auto, {', '.join(DTYPE_BYTES)}")
    return name


def _need_int(config: Config, key: str) -> int:
    return int(_need_float(config, key))


def _need_float(config: Config, key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float):
        raise ConfigError(f"config.json needs a number for {key}, found {value!r}")
    return value
