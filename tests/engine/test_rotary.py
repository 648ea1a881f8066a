"""Rotary frequencies, cosines and sines are those of transformers, for every way to stretch them and for the settings of real models."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding as V2Rotary
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding as V3Rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from baton.engine.config_json import spec_from_config
from baton.engine.config_json.rope import ROPE_TYPES, max_positions, rope_spec
from baton.engine.devices import open_device
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.rotary import Rotary, rotary_frequencies
from baton.engine.setting import Setting
from baton.engine.spec import LinearScaling, ModelSpec, RopeSpec, YarnScaling
from baton.errors import ConfigError
from tests.mission_configs import CONFIGS, DEEPSEEK_V3_ROPE, LLAMA3_ROPE, QWEN_YARN

POSITIONS = torch.cat([torch.arange(0, 300), torch.tensor([4095, 4096, 32767, 32768, 40001, 65537, 131071, 131072])])
factors = st.floats(1.0, 64.0, allow_nan=False)
originals = st.integers(64, 65536)
thetas = st.sampled_from([10000.0, 500000.0, 1000000.0, 12345.6])
dims = st.integers(1, 96).map(lambda half: 2 * half)


def config(rope: dict[str, Any], dim: int, max_position_embeddings: int = 131072) -> dict[str, Any]:
    """As much of a config.json as rope needs, in the new form."""
    return {"rope_parameters": rope, "head_dim": dim, "hidden_size": 4 * dim, "max_position_embeddings": max_position_embeddings}


def agrees(rope: dict[str, Any], dim: int, **changes: Any) -> None:
    """Frequencies are equal to the last bit, and so is the attention factor."""
    described = {**config(rope, dim), **changes}
    spec = rope_spec(described, dim)
    theirs, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](LlamaConfig(**{**described, "num_attention_heads": 4}))
    mine = rotary_frequencies(spec, dim)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=False)
    assert (spec.scaling.attention_factor if isinstance(spec.scaling, YarnScaling) else 1.0) == factor


@given(thetas, factors, st.floats(0.5, 4.0), st.floats(0.1, 8.0), originals, dims)
def test_llama3(theta: float, factor: float, low: float, more: float, original: int, dim: int) -> None:
    bounds = {"low_freq_factor": low, "high_freq_factor": low + more, "original_max_position_embeddings": original}
    agrees({"rope_type": "llama3", "rope_theta": theta, "factor": factor, **bounds}, dim)


@given(thetas, factors, dims)
def test_linear(theta: float, factor: float, dim: int) -> None:
    agrees({"rope_type": "linear", "rope_theta": theta, "factor": factor}, dim)


@st.composite
def yarns(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of YaRN with any of the optional ones."""
    slow = draw(st.floats(0.25, 4.0))
    optional = {
        "beta_slow": st.just(slow),
        "beta_fast": st.floats(32.0, 64.0),
        "attention_factor": st.floats(0.5, 2.0),
        "mscale": st.sampled_from([0.0, 0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([0.0, 0.707, 1.0]),
        "truncate": st.booleans(),
        "original_max_position_embeddings": originals,
    }
    named = draw(st.sets(st.sampled_from(sorted(optional))))
    chosen = {name: draw(optional[name]) for name in sorted(named)}
    return {"rope_type": "yarn", "rope_theta": draw(thetas), "factor": draw(factors), **chosen}


@given(yarns(), dims)
def test_yarn(rope: dict[str, Any], dim: int) -> None:
    agrees(rope, dim)


def test_yarn_infers_a_factor_that_is_null() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 4096}
    described = config(rope, 64, max_position_embeddings=16384)
    spec = rope_spec(described, 64)
    assert isinstance(spec.scaling, YarnScaling) and spec.scaling.factor == 4.0
    checked = LlamaConfig(**config({**rope, "factor": 4.0}, 64, 16384), num_attention_heads=4)
    checked.rope_parameters["factor"] = None  # the class refuses what its function handles
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](checked)
    torch.testing.assert_close(rotary_frequencies(spec, 64), theirs, rtol=0, atol=0)
    assert spec.scaling.attention_factor == factor


def test_original_positions_of_the_config_win() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    agrees(rope, 64, original_max_position_embeddings=8192)
    spec = rope_spec({**config(rope, 64), "original_max_position_embeddings": 8192}, 64)
    assert isinstance(spec.scaling, YarnScaling) and spec.scaling.original_positions == 8192


def plain(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))


@given(thetas, dims)
def test_default(theta: float, dim: int) -> None:
    assert torch.equal(rotary_frequencies(RopeSpec(theta), dim), plain(theta, dim))
    assert rope_spec({"rope_theta": theta}, dim) == rope_spec({"rope_parameters": {"rope_theta": theta}}, dim) == RopeSpec(theta)


REAL = {
    "Llama-3.1-70B": (CONFIGS["Llama-3.1-70B-Instruct"], LlamaRotaryEmbedding),
    "Qwen2.5-7B + YaRN": ({**CONFIGS["Qwen2.5-7B-Instruct"], "rope_scaling": QWEN_YARN}, Qwen2RotaryEmbedding),
    "Qwen2.5-7B": (CONFIGS["Qwen2.5-7B-Instruct"], Qwen2RotaryEmbedding),
    "linear": ({**CONFIGS["Qwen2.5-7B-Instruct"], "rope_scaling": {"type": "linear", "factor": 2.5}}, Qwen2RotaryEmbedding),
    "DeepSeek-V3": (CONFIGS["DeepSeek-V3"], V3Rotary),
    "DeepSeek-V3, mscale apart": ({**CONFIGS["DeepSeek-V3"], "rope_scaling": {**DEEPSEEK_V3_ROPE, "mscale": 0.707}}, V3Rotary),
}


def rotary(spec: ModelSpec) -> Rotary:
    return Rotary(Setting(spec, Placement(), Groups.alone(), open_device("cpu")))


def hugging_face(described: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**{key: value for key, value in described.items() if key != "quantization_config"})


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cosines_of_real_models_up_to_131072(name: str, dtype: str) -> None:
    described, module = REAL[name]
    cos, sin = rotary(spec_from_config(described, dtype))(POSITIONS, int(POSITIONS.max()))
    like = torch.empty(0, dtype=getattr(torch, dtype))
    theirs = module(hugging_face(described))(like, POSITIONS[None])
    half = cos.shape[-1]
    assert cos.shape == sin.shape == (len(POSITIONS), 1, half) and cos.dtype == like.dtype
    for mine, their in ((cos, theirs[0]), (sin, theirs[1])):
        # Not to the last bit: torch's vectorised cosine depends on where in a tensor a number stands.
        torch.testing.assert_close(mine[:, 0], their[0, :, :half], rtol=0, atol=1e-6 if dtype == "float32" else 2**-8)


def test_what_is_looked_up_is_what_is_computed() -> None:
    angles = rotary(spec_from_config(CONFIGS["Qwen2.5-7B-Instruct"], "float32"))
    positions = torch.tensor([0, 1, 4000, 17, 4000])
    looked_up, computed = angles(positions, 4000), angles(torch.cat((positions, torch.tensor([100_000]))), 100_000)
    for mine, their in zip(looked_up, computed, strict=True):
        torch.testing.assert_close(mine, their[:-1], rtol=0, atol=1e-6)


def test_cosines_of_deepseek_v2_up_to_131072() -> None:
    described = CONFIGS["DeepSeek-V2-Lite"]
    cos, sin = rotary(spec_from_config(described, "float32"))(POSITIONS, int(POSITIONS.max()))
    theirs = V2Rotary(hugging_face(described))(torch.empty(0), POSITIONS[None])
    torch.testing.assert_close(torch.complex(cos, sin)[:, 0], theirs[0], rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(st.sampled_from(["DeepSeek-V2-Lite", "DeepSeek-V3"]), factors, st.sampled_from([None, 0.0, 0.707, 1.0]))
def test_softmax_scale_of_latent_attention(name: str, factor: float, all_dims: float | None) -> None:
    rope = {**DEEPSEEK_V3_ROPE, "factor": factor, "mscale_all_dim": all_dims}
    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    described = {**CONFIGS[name], **small, "rope_scaling": {key: value for key, value in rope.items() if value is not None}}
    with torch.device("meta"):
        kind = DeepseekV2Attention if "V2" in name else DeepseekV3Attention
        theirs = kind(hugging_face(described), 0)
    assert spec_from_config(described).softmax_scale == theirs.scaling


def test_softmax_scale_without_stretching_is_plain() -> None:
    described = {key: value for key, value in CONFIGS["DeepSeek-V3"].items() if key != "rope_scaling"}
    assert spec_from_config(described).softmax_scale == 192**-0.5
    mscale = 0.1 * math.log(40) + 1.0
    assert spec_from_config(CONFIGS["DeepSeek-V3"]).softmax_scale == pytest.approx(192**-0.5 * mscale**2)


def test_yarn_lengthens_the_context() -> None:
    stretched = spec_from_config({**CONFIGS["Qwen2.5-7B-Instruct"], "rope_scaling": QWEN_YARN})
    assert stretched.max_position_embeddings == 131072
    assert spec_from_config({**CONFIGS["Qwen3-8B"], "rope_scaling": QWEN_YARN}).max_position_embeddings == 131072
    assert spec_from_config(CONFIGS["DeepSeek-V3"]).max_position_embeddings == 163840
    assert spec_from_config(CONFIGS["Llama-3.1-70B-Instruct"]).max_position_embeddings == 131072
    assert max_positions({"max_position_embeddings": 16384}, RopeSpec(1e4, LinearScaling(4.0)), 1) == 16384
    longer_still = YarnScaling(2.0, 4096, 32, 1, 1.0)
    assert max_positions({"max_position_embeddings": 16384}, RopeSpec(1e4, longer_still), 1) == 16384


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope"}, "rope type 'longrope' is not supported; supported are " + ", ".join(ROPE_TYPES)),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic' is not supported"),
        ({"type": "mrope"}, "rope type 'mrope' is not supported"),
        ({"rope_type": "llama3", "factor": 8.0}, "number for low_freq_factor"),
        ({**LLAMA3_ROPE, "high_freq_factor": 1.0}, "high_freq_factor=1 must be above low_freq_factor=1"),
        ({**LLAMA3_ROPE, "factor": -2}, "factor=-2 must be above 0"),
        ({**LLAMA3_ROPE, "original_max_position_embeddings": 0}, "original_max_position_embeddings=0 must be at least 1"),
        ({"rope_type": "linear"}, "number for factor"),
        ({"rope_type": "linear", "factor": 0}, "factor=0 must be above 0"),
        ({"rope_type": "yarn"}, "number for factor"),
        ({**QWEN_YARN, "beta_fast": 0.5}, "beta_fast=0.5 must be at least beta_slow=1"),
        ({**QWEN_YARN, "beta_slow": -1}, "both above 0"),
        ({**QWEN_YARN, "attention_factor": 0.0}, "attention_factor=0 must be above 0"),
        ({**QWEN_YARN, "mscale": -1}, "mscale=-1 must be at least 0"),
        ({**QWEN_YARN, "truncate": "no"}, "true or false for truncate"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": 1.0}, "rope_theta=1 must be above 1"),
        ({"rope_theta": "big"}, "number for rope_theta, found 'big'"),
        ({"full_attention": {"rope_theta": 1e4}}, r"by kind of layer \(full_attention\)"),
    ],
)
def test_what_rope_cannot_be_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_spec({"rope_scaling": rope, "max_position_embeddings": 1024}, 64)


def test_an_odd_width_and_missing_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="odd: 63"):
        rope_spec({}, 63)
    with pytest.raises(ConfigError, match="rope type yarn needs original_max_position_embeddings"):
        rope_spec({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 64)
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.25"):
        rope_spec({"partial_rotary_factor": 0.25}, 64)
