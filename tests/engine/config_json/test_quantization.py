"""What a checkpoint says about its quantization is taken, or refused by name with the list of what is taken."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from baton.engine.config_json import load_spec, spec_from_config
from baton.engine.config_json.quantization import DESCRIPTION, checkpoint_kind, quantization_of
from baton.errors import ConfigError
from tests.mission_configs import CONFIGS

PLAIN = CONFIGS["Qwen3-8B"]
FP8 = CONFIGS["DeepSeek-V3"]["quantization_config"]
# As llm-compressor writes it for its scheme W8A8.
COMPRESSED = {
    "config_groups": {
        "group_0": {
            "input_activations": {"actorder": None, "dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "int"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": "minmax",
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "int-quantized",
    "global_compression_ratio": 1.24,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
DESCRIBED = {
    "model_quant_type": "W8A8_DYNAMIC",
    "version": "1.0.0",
    "group_size": 0,
    "model.embed_tokens.weight": "FLOAT",
    "model.layers.0.self_attn.q_proj.weight": "W8A8_DYNAMIC",
    "model.layers.0.self_attn.q_proj.weight_scale": "W8A8_DYNAMIC",
    "model.layers.0.self_attn.q_proj.weight_offset": "W8A8_DYNAMIC",
}


def quantized(config: dict[str, Any]) -> dict[str, Any]:
    return {**PLAIN, "quantization_config": config}


def changed(path: str, value: object) -> dict[str, Any]:
    """COMPRESSED with one field replaced; a path begins with the group's number, or is one of the whole."""
    config = deepcopy(COMPRESSED)
    inner: Any = config
    *outer, last = path.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "description", "kind"),
    [
        (PLAIN, None, None),
        ({**PLAIN, "quantization_config": None}, None, None),
        ({**PLAIN, "quantize": "float"}, None, None),
        (quantized(FP8), None, "fp8"),
        (quantized({**FP8, "scale_fmt": "ue8m0"}), None, "fp8"),
        (quantized({"quant_method": "fp8", "weight_block_size": [128, 128]}), None, "fp8"),
        (quantized(COMPRESSED), None, "w8a8"),
        ({**PLAIN, "compression_config": COMPRESSED}, None, "w8a8"),
        (quantized({**COMPRESSED, "sparsity_config": {}}), None, "w8a8"),
        (quantized({**COMPRESSED, "sparsity_config": {"format": "dense"}}), None, "w8a8"),
        ({**PLAIN, "quantize": "w8a8_dynamic"}, None, "w8a8"),
        ({**PLAIN, "quantize": "w8a8_dynamic"}, DESCRIBED, "w8a8"),
        (PLAIN, DESCRIBED, "w8a8"),
        (PLAIN, {"model_quant_type": "FLOAT", "model.norm.weight": "FLOAT"}, None),
        (quantized(DESCRIBED), None, "w8a8"),
    ],
)
def test_the_kinds_that_are_read(config: dict[str, Any], description: dict[str, Any] | None, kind: str | None) -> None:
    assert checkpoint_kind(config, description) == kind
    assert quantization_of(config, description, "auto") == ("w8a8" if kind == "w8a8" else None)
    assert quantization_of(config, description, "w8a8") == "w8a8"
    if kind == "w8a8":
        with pytest.raises(ConfigError, match=r"none cannot be had.*already"):
            quantization_of(config, description, "none")
    else:
        assert quantization_of(config, description, "none") is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "gptq", "bits": 8}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({"group_size": 64, "bits": 4}, "quant_method None"),
        ({"quant_method": "fp8"}, "fp8 with weight_block_size None"),
        ({**FP8, "weight_block_size": [64, 64]}, r"fp8 with weight_block_size \[64, 64\]"),
        ({**FP8, "activation_scheme": "static"}, "fp8 with activation_scheme 'static'"),
        ({**FP8, "fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
        (changed("format", "pack-quantized"), "compressed-tensors with format 'pack-quantized'"),
        (changed("format", "float-quantized"), "format 'float-quantized'"),
        (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme {'num_bits': 8}"),
        (changed("config_groups", {}), "config_groups is empty"),
        (changed("config_groups.group_0.weights.num_bits", 4), r"config_groups\.group_0\.weights\.num_bits 4"),
        (changed("config_groups.group_0.weights.strategy", "group"), r"weights\.strategy 'group'"),
        (changed("config_groups.group_0.weights.symmetric", False), r"weights\.symmetric False"),
        (changed("config_groups.group_0.weights.type", "float"), r"weights\.type 'float'"),
        (changed("config_groups.group_0.input_activations", None), r"input_activations\.num_bits None"),
        (changed("config_groups.group_0.input_activations.dynamic", False), r"input_activations\.dynamic False"),
        (changed("config_groups.group_0.input_activations.strategy", "tensor"), r"input_activations\.strategy 'tensor'"),
        (changed("config_groups.group_0.input_activations.symmetric", False), r"input_activations\.symmetric False"),
        (changed("config_groups.group_0.output_activations", {"num_bits": 8}), "output_activations"),
        (changed("config_groups.group_0.format", "pack-quantized"), r"group_0\.format 'pack-quantized'"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "w8a8", "none"])
def test_everything_else_is_refused_by_name(config: dict[str, Any], said: str, asked: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}.* is not supported|{said}; supported") as refusal:
        spec_from_config(quantized(config), "auto", asked)
    assert "modelslim W8A8_DYNAMIC" in refusal.value.message, "the list of what is supported"


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({**DESCRIBED, "model.layers.1.mlp.down_proj.weight": "W8A8"}, r"'W8A8' \(modelslim, of model.layers.1.mlp.down_proj.weight\)"),
        ({**DESCRIBED, "model.layers.1.mlp.down_proj.weight": "W4A8_DYNAMIC"}, "'W4A8_DYNAMIC'"),
        ({**DESCRIBED, "kv_quant_type": "C8"}, "kv_quant_type 'C8'"),
        ({**DESCRIBED, "fa_quant_type": "FAQuant"}, "fa_quant_type 'FAQuant'"),
        ({"model_quant_type": "W4A16"}, "'W4A16'"),
        ({"model_quant_type": ["W8A8_DYNAMIC"]}, r"\['W8A8_DYNAMIC'\]"),
        ({}, "None"),
    ],
)
def test_other_kinds_of_modelslim_are_refused_by_name(description: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}.* is not supported; supported are"):
        checkpoint_kind(PLAIN, description)


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'w4a8' \(`quantize` in config\.json\) is not supported; supported are"):
        checkpoint_kind({**PLAIN, "quantize": "w4a8"})
    with pytest.raises(ConfigError, match="quantization 'int3' is not supported; supported are auto, none, w8a8"):
        quantization_of(PLAIN, None, "int3")
    with pytest.raises(ConfigError, match="object for quantization_config"):
        checkpoint_kind({**PLAIN, "quantization_config": "fp8"})


def test_a_description_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    assert load_spec(tmp_path).quantization is None
    assert load_spec(tmp_path, quantization="w8a8").quantization == "w8a8"
    (tmp_path / DESCRIPTION).write_text(json.dumps(DESCRIBED))
    assert load_spec(tmp_path).quantization == "w8a8"
    (tmp_path / DESCRIPTION).write_text("{")
    with pytest.raises(ConfigError, match=f"{DESCRIPTION} is not valid JSON"):
        load_spec(tmp_path)


def test_deepseek_is_computed_in_bfloat16_and_int8_on_demand() -> None:
    assert spec_from_config(CONFIGS["DeepSeek-V3"]).dtype == "bfloat16"
    assert spec_from_config(CONFIGS["DeepSeek-V3"]).quantization is None
    assert spec_from_config(CONFIGS["DeepSeek-V3"], quantization="w8a8").quantization == "w8a8"
