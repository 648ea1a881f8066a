"""Models that nobody would make, of every architecture: whatever their numbers, each layout that takes them equals transformers."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from baton.engine.config_json import load_spec
from baton.engine.fits import Role, SplitMoe, check_node
from baton.engine.spec import ModelSpec
from baton.errors import ConfigError
from tests.engine.driving import Job, asks, run_in_threads
from tests.engine.golden import assert_equal, expected
from tests.tiny_models import save_model, tiny_config

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = (
    *({"rope_type": "default"}, {"rope_type": "linear", "factor": 1.5}, LLAMA3, YARN),
    *({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, {**YARN, "attention_factor": 1.3}, {**YARN, "mscale_all_dim": 1.0}),
    *({**YARN, "beta_fast": 8.0, "beta_slow": 2.0}, {**YARN, "truncate": False}, {**YARN, "factor": 1.0}),
)
DERIVED = ("head_dim", "qk_head_dim", "layer_types")
# tp, dp, role, how prefill shares experts
LAYOUTS: tuple[tuple[int, int, Role, SplitMoe], ...] = (
    *((1, 1, "prefill", "experts"), (2, 1, "prefill", "experts"), (3, 1, "prefill", "experts"), (4, 1, "prefill", "experts")),
    *((2, 1, "prefill", "tensor"), (4, 1, "prefill", "tensor"), (1, 2, "decode", "experts"), (1, 3, "decode", "experts")),
    (2, 2, "decode", "experts"),
)


@st.composite
def odd_configs(draw: st.DrawFn) -> PreTrainedConfig:
    """A configuration of make_tiny with most of its numbers replaced."""
    arch = draw(st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2_grouped", "deepseek_v3"]))
    kv_heads = draw(st.integers(1, 4))
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), draw(st.sampled_from([2, 6, 10, 34]))
    numbers: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if arch.startswith("deepseek") else kv_heads,
        "hidden_size": heads * draw(st.sampled_from([2, 6, 10])),
        "intermediate_size": draw(st.sampled_from([12, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_parameters": {**draw(st.sampled_from(ROPES)), "rope_theta": draw(st.sampled_from([100.0, 1e6]))},
    }
    numbers |= _latent(draw) if arch.startswith("deepseek") else {"head_dim": head_dim}
    tiny = tiny_config(arch)
    kept = {name: value for name, value in tiny.to_dict().items() if name not in DERIVED}
    return type(tiny)(**{**kept, **numbers, **_experts(draw, arch)})


def _latent(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kv_lora_rank": draw(st.sampled_from([4, 12])),
        "q_lora_rank": draw(st.sampled_from([None, 6])),
        "qk_nope_head_dim": draw(st.sampled_from([2, 10])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 6])),
        "v_head_dim": draw(st.sampled_from([2, 6, 30])),
        "rope_interleave": draw(st.booleans()),
    }


def _experts(draw: st.DrawFn, arch: str) -> dict[str, Any]:
    groups, per_group = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    top_groups = draw(st.integers(1, groups))
    numbers = {
        "num_experts_per_tok": draw(st.integers(1, top_groups * per_group)),
        "moe_intermediate_size": draw(st.sampled_from([4, 12])),
        "norm_topk_prob": draw(st.booleans()),
    }
    if arch == "qwen3_moe":
        return {**numbers, "num_experts": groups * per_group, "mlp_only_layers": [], "decoder_sparse_step": draw(st.integers(1, 2))}
    grouped = {"n_routed_experts": groups * per_group, "n_group": groups, "topk_group": top_groups}
    return {**numbers, **grouped, "n_shared_experts": draw(st.integers(1, 3)), "first_k_dense_replace": draw(st.integers(0, 3))}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(odd_configs(), st.data(), st.integers(0, 1 << 16))
def test_an_odd_model_equals_transformers(config: PreTrainedConfig, data: st.DataObject, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder)
        save_model(config, model_dir, seed=seed)
        spec = load_spec(model_dir)
        tp, dp, role, moe = data.draw(st.sampled_from([layout for layout in LAYOUTS if fits(spec, *layout)]))
        groups = tuple(tuple(asks(seed + group, data.draw(prompt_lens), num_tokens=4)) for group in range(dp))
        job = Job(model_dir, tp, dp, role == "decode" and spec.moe is not None, groups, role == "prefill" and moe == "tensor")
        for wanted, got in zip(groups, run_in_threads(job), strict=True):
            assert_equal(got, expected(model_dir, wanted))


prompt_lens = st.lists(st.sampled_from([1, 2, 9, 30]), max_size=2)


def fits(spec: ModelSpec, tp: int, dp: int, role: Role, moe: SplitMoe) -> bool:
    try:
        check_node(spec, role, tp, dp, moe)
    except ConfigError:
        return False
    return True
