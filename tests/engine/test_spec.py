"""config.json is read as transformers reads it, in its new and its old form; what Baton would compute wrongly is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baton.engine.config_json import load_spec, read_config, spec_from_config
from baton.engine.fingerprint import fingerprint
from baton.engine.rotary import rotary_frequencies
from baton.engine.spec import RopeSpec
from baton.errors import ConfigError
from tests.tiny_models import ARCHITECTURES, LLAMA3_ROPE, tiny_config

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spec_says_what_transformers_says(arch: str, tiny: Tiny) -> None:
    spec, config = load_spec(tiny(arch)), AutoConfig.from_pretrained(tiny(arch))
    assert (spec.model_type, spec.num_layers, spec.hidden) == (config.model_type, config.num_hidden_layers, config.hidden_size)
    assert (spec.heads, spec.kv_heads, spec.head_dim) == (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (spec.vocab, spec.intermediate, spec.norm_eps) == (config.vocab_size, config.intermediate_size, config.rms_norm_eps)
    assert (spec.tie_embeddings, spec.max_position_embeddings) == (config.tie_word_embeddings, config.max_position_embeddings)
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.dtype == "float32" and spec.dtype_bytes == 4


def test_experts_sit_where_transformers_puts_them(tiny: Tiny) -> None:
    spec = load_spec(tiny("qwen3_moe"))
    assert spec.moe is not None
    assert (spec.moe.num_experts, spec.moe.gate.top_k, spec.moe.intermediate, spec.moe.gate.normalize) == (8, 3, 32, True)
    assert spec.moe.sparse_layers == (True, False, True)
    assert [spec.sparse(layer) for layer in range(3)] == [True, False, True]
    every_other = spec_from_config(edited("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2))
    assert every_other.moe is not None and every_other.moe.sparse_layers == (False, True, False)


def edited(arch: str, **changes: Any) -> dict[str, Any]:
    """What transformers writes for `arch`, with some keys replaced, or left out where the new value is None."""
    config = {**tiny_config(arch).to_dict(), "architectures": [NAMES[arch]], **changes}
    return {key: value for key, value in config.items() if value is not None}


NAMES = {
    "llama": "LlamaForCausalLM",
    "llama_tied": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def test_older_forms_mean_the_same() -> None:
    old = edited("llama_tied", rope_parameters=None, rope_theta=10000.0, dtype=None, torch_dtype="bfloat16")
    old["rope_scaling"] = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert spec_from_config(old) == spec_from_config(edited("llama_tied", dtype="bfloat16"))
    hub = edited("qwen3_moe", num_local_experts=None, num_experts=8)
    assert spec_from_config(hub) == spec_from_config(edited("qwen3_moe"))


def test_what_a_checkpoint_leaves_out_has_its_default() -> None:
    spec = spec_from_config(edited("qwen2", head_dim=None, num_key_value_heads=None, rope_parameters=None, dtype=None))
    assert (spec.head_dim, spec.kv_heads, spec.rope, spec.dtype) == (16, 4, RopeSpec(10000.0), "float32")
    assert spec_from_config(edited("qwen3", head_dim=None)).head_dim == 128


def test_biases_follow_the_architecture() -> None:
    def biases(arch: str, **changes: Any) -> tuple[bool, bool, bool]:
        spec = spec_from_config(edited(arch, **changes))
        return spec.qkv_bias, spec.output_bias, spec.mlp_bias

    assert biases("llama") == (True, True, True)
    assert biases("llama_tied") == (False, False, False)
    assert biases("qwen2") == (True, False, False)
    assert biases("qwen3", attention_bias=True) == (True, True, False)


@pytest.mark.parametrize(
    ("asked", "dtype"), [("auto", "bfloat16"), ("fp32", "float32"), ("half", "float16"), ("torch.float16", "float16"), ("bf16", "bfloat16")]
)
def test_dtype_is_the_checkpoints_or_the_operators(asked: str, dtype: str) -> None:
    assert spec_from_config(edited("qwen3", dtype="bfloat16"), asked).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Qwen2"),
        ({"architectures": []}, "model_type 'qwen2' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope type 'yarn' is not supported; supported are default, llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "number for low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "sliding_window=64"),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": None, "max_window_layers": 1}, "sliding_window=64"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported; supported are auto, float32, bfloat16, float16"),
        ({"hidden_size": None}, "number for hidden_size, found None"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_config(edited("qwen2", **changes))


def test_experts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok=9 must be between 1 and num_experts=8"):
        spec_from_config(edited("qwen3_moe", num_experts_per_tok=9))


def test_a_window_that_no_layer_uses_is_no_window() -> None:
    used_by_none = {"use_sliding_window": True, "sliding_window": 64}
    assert spec_from_config(edited("qwen2", **used_by_none, layer_types=["full_attention"] * 2))
    assert spec_from_config(edited("qwen2", **used_by_none, layer_types=None, max_window_layers=28))


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize("arch", ["llama", "llama_tied"])
def test_frequencies_are_those_of_transformers(arch: str) -> None:
    config = tiny_config(arch)
    mine = rotary_frequencies(spec_from_config(edited(arch)).rope, config.head_dim)
    if arch == "llama_tied":
        torch.testing.assert_close(mine, ROPE_INIT_FUNCTIONS["llama3"](config)[0], rtol=0, atol=0)
    else:
        torch.testing.assert_close(mine, 10000.0 ** -(torch.arange(0, 16, 2) / 16))


def test_fingerprint_is_the_contents_and_not_the_place(tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("llama"), tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(tiny("llama")) != fingerprint(tiny("llama_tied"))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        original = (copy / name).read_bytes()
        (copy / name).write_bytes(original[:-2] + bytes([original[-2] ^ 1]) + original[-1:])
        if name == "config.json":
            (copy / name).write_text(json.dumps({**json.loads(original), "rms_norm_eps": 1e-5}))
        assert fingerprint(copy) != fingerprint(tiny("llama")), name
        (copy / name).write_bytes(original)
    assert fingerprint(copy) == fingerprint(tiny("llama"))


def test_fingerprint_sees_the_header_and_the_end_of_a_large_file(tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("llama"), tmp_path / "copy"))
    seen = set()
    for at in (None, 0, 20, (1 << 20) - 1, (40 << 20) - 1):
        content = bytearray(40 << 20)
        if at is not None:
            content[at] ^= 1
        (copy / "model.safetensors").write_bytes(content)
        seen.add(fingerprint(copy))
    assert len(seen) == 5
