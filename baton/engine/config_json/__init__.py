"""config.json -> ModelSpec: checked and completed. Knows no tensors and no devices; rope, experts, latent attention and
quantization have files of their own.

Field names and defaults are those of the `transformers` configuration classes: what a checkpoint on the hub may leave out
has the default of its class, anything that would change the computation in a way Baton does not implement is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.engine.config_json.experts import moe_spec
from baton.engine.config_json.fields import Config, Fields
from baton.engine.config_json.latent import mla_spec
from baton.engine.config_json.quantization import DESCRIPTION, quantization_of
from baton.engine.config_json.rope import latent_softmax_scale, max_positions, rope_spec
from baton.engine.spec import DTYPE_BYTES, MlaSpec, ModelSpec, RopeSpec
from baton.errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
_DTYPE_ALIASES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_MAX_POSITIONS = {"llama": 2048, "deepseek_v2": 2048, "deepseek_v3": 4096}
_LATENT = ("deepseek_v2", "deepseek_v3")


def load_spec(model_dir: Path | str, dtype: str = "auto", quantization: str = "auto") -> ModelSpec:
    """Read `model_dir`/config.json. dtype: "auto" takes the checkpoint's, else float32, bfloat16, float16 or an alias.

    quantization: "auto" takes the checkpoint's, "none" refuses a quantized one that cannot be turned back, "w8a8" makes it so.
    Raises ConfigError, naming what is missing or not supported.
    """
    folder = Path(model_dir)
    description = _read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else None
    return spec_from_config(read_config(folder), dtype, quantization, description)


def read_config(model_dir: Path | str) -> dict[str, Any]:
    """config.json as it stands. Raises ConfigError if there is none or it is not a JSON object."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: --model must be a checkpoint directory as transformers saves it")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def spec_from_config(config: Config, dtype: str = "auto", quantization: str = "auto", description: Config | None = None) -> ModelSpec:
    """The spec that a parsed config.json describes, with modelslim's `description` where there is one. Pure; raises ConfigError."""
    fields, model_type = Fields(config), model_type_of(config)
    _refuse_unsupported(fields)
    attention = (_latent if model_type in _LATENT else _grouped)(model_type, config)
    bias = fields.flag("attention_bias")
    return ModelSpec(
        model_type=model_type,
        num_layers=fields.count("num_hidden_layers"),
        hidden=fields.count("hidden_size"),
        intermediate=fields.count("intermediate_size"),
        heads=fields.count("num_attention_heads"),
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        softmax_scale=attention.softmax_scale,
        vocab=fields.count("vocab_size"),
        rope=attention.rope,
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias and model_type != "qwen2",
        mlp_bias=_mlp_bias(model_type, fields),
        qk_norm=model_type.startswith("qwen3"),
        max_position_embeddings=max_positions(config, attention.rope, _MAX_POSITIONS.get(model_type, 32768)),
        dtype=_dtype(config, dtype),
        moe=moe_spec(model_type, config),
        mla=attention.mla,
        quantization=quantization_of(config, description, quantization),
        num_mtp_layers=_num_mtp_layers(model_type, fields),
    )


def model_type_of(config: Config) -> str:
    """A value of ARCHITECTURES. Raises ConfigError naming the architecture and those that are supported."""
    names = [str(name) for name in Fields(config).listed("architectures")]
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    found = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    raise ConfigError(f"architecture {found} is not supported; supported are {', '.join(ARCHITECTURES)}")


@dataclass(frozen=True, slots=True)
class _Attention:
    """What the two kinds of attention say differently."""

    kv_heads: int
    head_dim: int
    rope: RopeSpec
    softmax_scale: float
    mla: MlaSpec | None = None


def _grouped(model_type: str, config: Config) -> _Attention:
    """Grouped-query attention: Llama and Qwen."""
    fields = Fields(config)
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if not fields.given("head_dim") and model_type != "qwen3" and hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and head_dim is not given")
    head_dim = fields.count("head_dim", 128 if model_type == "qwen3" else max(1, hidden // heads))
    return _Attention(kv_heads, head_dim, rope_spec(config, head_dim), head_dim**-0.5)


def _latent(model_type: str, config: Config) -> _Attention:
    """DeepSeek's: one head of latent + rope is cached. V2 always rotates neighbours, V3 unless rope_interleave is false."""
    mla = mla_spec(config)
    interleaved = model_type == "deepseek_v2" or Fields(config).flag("rope_interleave", True)
    rope = rope_spec(config, mla.rope, interleaved)
    return _Attention(1, mla.latent + mla.rope, rope, latent_softmax_scale(config, mla.nope + mla.rope, rope), mla)


def _mlp_bias(model_type: str, fields: Fields) -> bool:
    """Llama's; other classes of transformers do not read the field, except DeepSeek-V2's, which no checkpoint is known to set."""
    bias = fields.flag("mlp_bias")
    if bias and model_type == "deepseek_v2":
        raise ConfigError("mlp_bias is not supported for DeepseekV2ForCausalLM")
    return bias and model_type == "llama"


def _num_mtp_layers(model_type: str, fields: Fields) -> int:
    return fields.count("num_nextn_predict_layers", 1, least=0) if model_type == "deepseek_v3" else 0


def _refuse_unsupported(fields: Fields) -> None:
    fields.choice("hidden_act", ("silu",), "silu")
    if not fields.flag("use_sliding_window") or not fields.given("sliding_window"):
        return
    if _has_sliding_layer(fields):
        window = fields.count("sliding_window")
        raise ConfigError(f"sliding_window={window} with use_sliding_window is not supported: attention is full here")


def _has_sliding_layer(fields: Fields) -> bool:
    if fields.given("layer_types"):
        return any(kind != "full_attention" for kind in fields.listed("layer_types"))
    return fields.count("max_window_layers", 0, least=0) < fields.count("num_hidden_layers")


def _dtype(config: Config, asked: str) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32") if asked == "auto" else asked
    name = _DTYPE_ALIASES.get(name, name).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype {name!r} is not supported; supported are auto, {', '.join(DTYPE_BYTES)}")
    return name
