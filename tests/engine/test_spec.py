"""config.json is read as transformers reads it, in its new and its old form; what Baton would compute wrongly is refused by name."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config

from baton.engine.config_json import ARCHITECTURES, load_spec, read_config, spec_from_config
from baton.engine.spec import GateSpec, MlaSpec, RopeSpec
from baton.errors import ConfigError
from tests.mission_configs import CONFIGS
from tests.tiny_models import LLAMA3_ROPE, tiny_config

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "qwen2", "qwen3", "qwen3_moe"])
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


def deepseek(version: int, **changes: Any) -> dict[str, Any]:
    """What transformers writes for its default DeepSeek of this version, with some keys replaced."""
    config = DeepseekV2Config(num_experts_per_tok=6) if version == 2 else DeepseekV3Config()
    return {**config.to_dict(), "architectures": [f"DeepseekV{version}ForCausalLM"], **changes}


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
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "sliding_window=64"),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": None, "max_window_layers": 1}, "sliding_window=64"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported; supported are auto, float32, bfloat16, float16"),
        ({"hidden_size": None}, "number for hidden_size, found None"),
        ({"hidden_size": "64"}, "number for hidden_size, found '64'"),
        ({"hidden_size": 64.5}, "number for hidden_size, found 64.5"),
        ({"vocab_size": True}, "number for vocab_size, found True"),
        ({"rms_norm_eps": float("nan")}, "number for rms_norm_eps, found nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0 must be above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_hidden_layers": 10**400}, "0 must be at most 2147483647"),
        ({"rms_norm_eps": 10**400}, "finite number for rms_norm_eps, found 10000"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 1e300}}, r"=1024 x factor=1e\+300 must be at most 2147483647"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"num_key_value_heads": -1}, "num_key_value_heads=-1 must be at least 1"),
        ({"head_dim": None, "num_attention_heads": 6}, "hidden_size=64 is no multiple of num_attention_heads=6, and head_dim is not given"),
        ({"head_dim": 15}, "odd: 15"),
        ({"attention_bias": "no"}, "true or false for attention_bias, found 'no'"),
        ({"rope_parameters": ["yarn"]}, "object for rope_parameters"),
        ({"architectures": "Qwen2ForCausalLM"}, "list for architectures"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_config(edited("qwen2", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and num_experts=8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
        ({"num_local_experts": 0}, "num_local_experts=0 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
        ({"mlp_only_layers": 1}, "list for mlp_only_layers"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_config(edited("qwen3_moe", **changes))


@pytest.mark.parametrize("version", [2, 3])
def test_latent_attention_describes_what_is_cached(version: int) -> None:
    spec = spec_from_config(deepseek(version))
    assert spec.model_type == f"deepseek_v{version}"
    assert spec.mla == MlaSpec(query_rank=1536, latent=512, nope=128, rope=64, value=128)
    assert (spec.kv_heads, spec.head_dim, spec.part_dims, spec.rope_dim) == (1, 576, (576,), 64)
    assert spec.softmax_scale == 192**-0.5
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm) == (False, False, False, False)
    biased = spec_from_config(deepseek(version, attention_bias=True, q_lora_rank=None))
    assert (biased.qkv_bias, biased.output_bias) == (True, True)
    assert biased.mla is not None and biased.mla.query_rank is None


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "DeepSeek-V3"])
def test_a_hub_config_and_what_transformers_makes_of_it_mean_the_same(name: str, tmp_path: Path) -> None:
    hub = {key: value for key, value in CONFIGS[name].items() if key != "quantization_config"}
    written = AutoConfig.for_model(**hub).to_dict()
    assert "rope_scaling" not in written, "the new form"
    assert spec_from_config({**written, "architectures": hub["architectures"], "dtype": "bfloat16"}) == spec_from_config(hub)


def test_defaults_are_those_of_the_classes() -> None:
    for version in (2, 3):
        sizes = ("architectures", "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
        full = deepseek(version)
        sparse = {key: full[key] for key in (*sizes, "num_experts_per_tok")}
        assert spec_from_config(sparse) == spec_from_config(full)


def test_pairs_are_neighbours_in_deepseek() -> None:
    assert spec_from_config(deepseek(2)).rope.interleaved
    assert spec_from_config(deepseek(2, rope_interleave=False)).rope.interleaved, "V2 has no such field"
    assert spec_from_config(deepseek(3)).rope.interleaved
    assert not spec_from_config(deepseek(3, rope_interleave=False)).rope.interleaved


def test_gates_are_those_of_transformers() -> None:
    def gate(version: int, **changes: Any) -> GateSpec:
        moe = spec_from_config(deepseek(version, **changes)).moe
        assert moe is not None
        return moe.gate

    assert gate(2) == GateSpec(top_k=6)
    assert gate(2, norm_topk_prob=True, n_group=8, topk_group=3, routed_scaling_factor=16.0) == GateSpec(top_k=6, scale=16.0)
    limited = GateSpec(top_k=6, scale=16.0, num_groups=8, top_groups=3)
    assert gate(2, topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0) == limited
    v3 = GateSpec(8, "sigmoid", normalize=True, scale=2.5, biased=True, num_groups=8, top_groups=4, group_score="top2")
    assert gate(3) == v3
    assert not gate(3, norm_topk_prob=False).normalize


def test_first_layers_are_dense_and_every_token_visits_the_shared_experts() -> None:
    moe = spec_from_config(deepseek(3, num_hidden_layers=6, first_k_dense_replace=2, n_shared_experts=2)).moe
    assert moe is not None and moe.sparse_layers == (False, False, True, True, True, True)
    assert (moe.num_experts, moe.intermediate, moe.shared_intermediate) == (256, 2048, 4096)
    moe = spec_from_config(deepseek(2, num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2, n_shared_experts=0)).moe
    assert moe is not None and moe.sparse_layers == (False, False, True, False, True, False)
    assert moe.shared_intermediate == 0


def test_layers_of_multi_token_prediction_are_counted() -> None:
    assert spec_from_config(deepseek(3)).num_mtp_layers == 1
    assert spec_from_config(deepseek(3, num_nextn_predict_layers=0)).num_mtp_layers == 0
    assert spec_from_config(deepseek(2)).num_mtp_layers == 0


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (3, {"n_routed_experts": 0}, "n_routed_experts=0 must be at least 1"),
        (3, {"n_routed_experts": 20}, "n_group=8 does not divide num_experts=20"),
        (3, {"topk_group": 9}, "topk_group=9 must be between 1 and n_group=8"),
        (3, {"n_group": 0}, "n_group=0 must be at least 1"),
        (3, {"num_experts_per_tok": 257}, "num_experts_per_tok=257 must be between 1 and num_experts=256"),
        (3, {"num_experts_per_tok": 33, "topk_group": 1}, "33 cannot be chosen from topk_group=1 groups of 32 experts"),
        (3, {"n_group": 256, "topk_group": 8}, "leaves 1 of 256 experts per group"),
        (3, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported; supported is noaux_tc"),
        (3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; supported is sigmoid"),
        (3, {"num_key_value_heads": 16}, "num_key_value_heads=16, num_attention_heads=128"),
        (3, {"qk_rope_head_dim": 63}, "odd: 63"),
        (3, {"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
        (3, {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be at least 0"),
        (2, {"moe_layer_freq": 0}, "moe_layer_freq=0 must be at least 1"),
        (2, {"num_experts_per_tok": None}, "number for num_experts_per_tok"),
        (2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported are greedy, group_limited_greedy"),
        (2, {"topk_method": "group_limited_greedy"}, "number for n_group"),
        (2, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported; supported is softmax"),
        (2, {"mlp_bias": True}, "mlp_bias is not supported for DeepseekV2"),
    ],
)
def test_what_deepseek_cannot_be_is_refused(version: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_config(deepseek(version, **changes))


# What a JSON file may hold.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([10**400, 1.7e308, 2**31 - 1, 1e-300]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type", "rope_type", "factor"]), inner, max_size=2),
    max_leaves=4,
)
OPTIONAL = ("dtype", "head_dim", "layer_types", "quantization_config", "quantize", "rope_parameters", "rope_scaling")


@given(st.sampled_from(sorted(CONFIGS)), st.data(), values)
def test_any_value_of_a_field_makes_a_model_or_is_refused(name: str, data: st.DataObject, value: object) -> None:
    """Never another error, which a user would take for a bug. Fields within rope and quantization settings, too."""
    config = dict(CONFIGS[name])
    field = data.draw(st.sampled_from(sorted({*config, *OPTIONAL} - {"num_hidden_layers"})))  # 2 ** 31 layers would be listed
    inner = config.get(field)
    if isinstance(inner, dict) and data.draw(st.booleans()):
        value = {**inner, data.draw(st.sampled_from(sorted(inner))): value}
    try:
        spec_from_config({**config, field: value})
    except ConfigError as error:
        assert error.message


def test_every_supported_architecture_is_listed_in_a_refusal() -> None:
    with pytest.raises(ConfigError, match=", ".join(ARCHITECTURES)):
        spec_from_config({"architectures": ["MambaForCausalLM"]})


def test_reading_a_config_needs_no_torch() -> None:
    modules = "baton.engine.spec, baton.engine.config_json, baton.engine.placement, baton.engine.fits"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'numpy', 'ray'}} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stderr


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
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_config(tmp_path)
