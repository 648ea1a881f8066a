"""Placement, threads and memory are decided rightly for every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import BatonConfig
from baton.engine.config_json import spec_from_config
from baton.engine.spec import ModelSpec
from baton.errors import ConfigError
from cluster.plan import (
    RANK_RESOURCE,
    Checkpoint,
    Host,
    asks,
    can_ever_fit,
    description,
    explain_shortage,
    memory_needed,
    rank_plans,
    refuse_overcommit,
    refuse_unfit,
    threads_per_rank,
    weight_bytes_per_rank,
)
from tests.mission_configs import CONFIGS, NUM_PARAMETERS

small = st.integers(1, 4)
BFLOAT16 = spec_from_config(CONFIGS["Qwen3-30B-A3B"])
specs = st.sampled_from([BFLOAT16, replace(BFLOAT16, dtype="float32"), replace(BFLOAT16, quantization="w8a8")])


@st.composite
def configs(draw: st.DrawFn) -> BatonConfig:
    return BatonConfig.model_validate(
        {
            "model": "m",
            "dtype": draw(st.sampled_from(["auto", "float32", "bfloat16"])),
            "kv_memory": draw(st.integers(1, 2**34)),
            "prefill": {"nodes": draw(small), "tp": draw(small), "threads": draw(st.integers(0, 3))},
            "decode": {"nodes": draw(small), "dp": draw(small), "tp": draw(small), "threads": draw(st.integers(0, 3))},
        }
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    experts, tables, rest = (draw(st.integers(0, 10**12)) for _ in range(3))
    return Checkpoint(experts + tables + rest, experts, tables)


hosts = st.builds(
    Host,
    address=st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
    cores=st.integers(1, 64),
    slots=st.integers(0, 16),
    free_slots=st.integers(0, 16),
    labels=st.dictionaries(st.sampled_from(["role", "zone"]), st.sampled_from(["a", "b"])),
)


@given(configs())
def test_asks_cover_all_ranks_once(config: BatonConfig) -> None:
    wanted = asks(config)
    assert sum(ask.num_ranks for ask in wanted) == config.num_ranks
    assert len({ask.node for ask in wanted}) == len(wanted) == config.prefill.nodes + config.decode.nodes
    for ask in wanted:
        assert ask.bundles() == [{RANK_RESOURCE: 1.0}] * ask.num_ranks
        assert len(ask.label_selectors()) == ask.num_ranks


@given(configs(), st.data())
def test_every_rank_has_one_plan_on_its_nodes_host(config: BatonConfig, data: st.DataObject) -> None:
    placed = [(ask, data.draw(hosts)) for ask in asks(config)]
    plans = rank_plans(config, placed)
    assert len(plans) == config.num_ranks
    assert len({(plan.node, plan.rank) for plan in plans}) == len(plans)
    host_of = {ask.node: host for ask, host in placed}
    for plan in plans:
        assert plan.host == host_of[plan.node].address
        assert plan.threads >= 1
        assert plan.rank < plan.num_ranks
        assert plan.num_ranks == next(ask.num_ranks for ask, _ in placed if ask.node == plan.node)


@given(configs(), st.integers(1, 256))
def test_threads_asked_for_are_given_and_others_share_the_cores(config: BatonConfig, cores: int) -> None:
    host = Host("127.0.0.1", cores)
    plans = rank_plans(config, [(ask, host) for ask in asks(config)])
    shared = threads_per_rank(cores, config.num_ranks)
    for plan in plans:
        asked = config.prefill.threads if plan.role == "prefill" else config.decode.threads
        assert plan.threads == (asked or shared)
    assert shared * config.num_ranks <= max(cores, config.num_ranks)


@given(configs(), st.booleans(), st.data())
def test_every_rank_has_a_slot_of_its_own_wherever_nodes_are(config: BatonConfig, lend: bool, data: st.DataObject) -> None:
    config = config.model_copy(update={"lend_cores": lend})
    hosts = [Host("a", 4, ledger="/a/cores"), Host("b", 8, ledger="/b/cores")]
    placed = [(ask, data.draw(st.sampled_from(hosts))) for ask in asks(config)]
    known = [item for item in placed if data.draw(st.booleans())]  # others are being built again
    slots = {(plan.node, plan.rank): plan.slot for plan in rank_plans(config, placed)}
    assert sorted(slots.values()) == list(range(config.num_ranks))
    for plan in rank_plans(config, known):
        assert plan.slot == slots[plan.node, plan.rank]
        assert plan.cores == {"a": 4, "b": 8}[plan.host]
        assert plan.ledger == (f"/{plan.host}/cores" if lend else "")


@given(configs(), checkpoints(), specs)
def test_weights_are_cut_but_never_lost(config: BatonConfig, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    for role, num_ranks in (("prefill", config.prefill.tp), ("decode", config.decode.dp * config.decode.tp)):
        per_rank = weight_bytes_per_rank(config, checkpoint, spec, role)  # type: ignore[arg-type]
        weight_bytes = 1 if spec.quantization else spec.dtype_bytes
        unquantized = (spec.dtype_bytes - weight_bytes) * checkpoint.num_unquantized_params
        assert per_rank * num_ranks >= checkpoint.num_params * weight_bytes + unquantized
        assert per_rank <= checkpoint.num_params * weight_bytes + unquantized + 3 * spec.dtype_bytes


@given(configs(), checkpoints(), specs)
def test_a_refusal_comes_exactly_below_the_need(config: BatonConfig, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    need = memory_needed(config, checkpoint, spec)
    assert need > config.num_ranks * config.kv_memory
    refuse_overcommit(config, checkpoint, spec, need)
    with pytest.raises(ConfigError, match="lower kv_memory"):
        refuse_overcommit(config, checkpoint, spec, need - 1)


def test_a_refusal_has_the_numbers() -> None:
    config = BatonConfig.model_validate({"model": "m", "kv_memory": "2GiB", "prefill": {"tp": 2}, "decode": {"dp": 2}})
    with pytest.raises(ConfigError) as refusal:
        refuse_overcommit(config, Checkpoint(2**29), BFLOAT16, 8 * 2**30)
    assert "8.00 GiB of memory available" in refusal.value.message
    assert "4 ranks x 2.00 GiB KV cache" in refusal.value.message
    assert "3.00 GiB weights in all" in refusal.value.message  # 1 GiB on prefill, cut in two; 1 GiB on each decode group


def test_the_estimate_is_close_for_the_largest_model() -> None:
    """Against what tests/engine/test_mission.py finds a rank to hold."""
    config = BatonConfig.model_validate({"model": "m", "prefill": {"tp": 16}, "decode": {"dp": 16}})
    experts, tables, latent = 58 * 256 * 3 * 7168 * 2048, 2 * 129280 * 7168, 61 * 512 * 128 * 256
    checkpoint = Checkpoint(NUM_PARAMETERS["DeepSeek-V3"], experts, tables + latent)
    spec = spec_from_config(CONFIGS["DeepSeek-V3"])
    assert weight_bytes_per_rank(config, checkpoint, spec, "decode") == pytest.approx(116.19e9, rel=0.01)
    assert weight_bytes_per_rank(config, checkpoint, spec, "prefill") == pytest.approx(86.02e9, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prefill": {"tp": 3}}, "prefill node of tp=3: num_attention_heads=32 does not divide by 3 ranks"),
        ({"decode": {"tp": 3}}, "decode node of dp=1 x tp=3: num_attention_heads=32 does not divide by 3 ranks"),
        ({"decode": {"dp": 3}}, "decode node of dp=3 x tp=1: num_experts=128 does not divide by 3 ranks"),
        ({"prefill": {"tp": 32, "moe": "tensor"}, "max_model_len": 40961}, "max_model_len 40961 is beyond the model's 40960 positions"),
        ({"kv_memory": "1MiB"}, "kv_memory of 1048576 bytes holds 0 blocks of 16 tokens"),
        ({"kv_memory": "64MiB", "max_model_len": 4096}, "holds 42 blocks .* at least 256 are needed"),
    ],
)
def test_what_no_rank_could_hold_is_refused_with_the_numbers(settings: dict[str, object], said: str) -> None:
    refuse_unfit(BatonConfig.model_validate({"model": "m"}), BFLOAT16)
    with pytest.raises(ConfigError, match=said):
        refuse_unfit(BatonConfig.model_validate({"model": "m", **settings}), BFLOAT16)


@given(st.lists(hosts, max_size=4), configs())
def test_a_shortage_is_explained_with_numbers(offered: list[Host], config: BatonConfig) -> None:
    for ask in asks(config):
        said = explain_shortage(ask, offered)
        assert f"{ask.node} needs {ask.num_ranks} {RANK_RESOURCE}" in said
        if offered and not can_ever_fit(ask, offered):
            assert f"--resources='{{\"{RANK_RESOURCE}\": {ask.num_ranks}}}'" in said


@pytest.mark.parametrize(
    ("offered", "said"),
    [
        ([], "no live host"),
        ([Host("h", 1, 8, 8)], "none of the 1 hosts carries these labels"),
        ([Host("h", 1, 1, 1, {"role": "p"})], "h: 1 free of 1"),
        ([Host("h", 1, 2, 0, {"role": "p"})], "others hold them"),
    ],
)
def test_each_shortage_says_what_to_do(offered: list[Host], said: str) -> None:
    config = BatonConfig.model_validate({"model": "m", "prefill": {"tp": 2}, "ray": {"prefill_label": {"role": "p"}}})
    assert said in explain_shortage(asks(config)[0], offered)


def test_a_cluster_is_described_with_what_limits_it() -> None:
    asked = {"model": "m", "kv_memory": "1GiB", "prefill": {"tp": 2}, "decode": {"dp": 2}}
    config = BatonConfig.model_validate(asked)
    said = description(config, replace(BFLOAT16, quantization="w8a8"))
    assert said.startswith("qwen3_moe, bfloat16, w8a8; prefill 1 x tp 2, decode 1 x dp 2 x tp 1; up to ")
    held = 2**30 // (16 * BFLOAT16.num_layers * BFLOAT16.kv_heads * 2 * BFLOAT16.head_dim * 2) * 16
    assert f"up to {held} tokens per sequence (kv_memory 1.00 GiB per rank; the model allows {BFLOAT16.max_position_embeddings})" in said
    assert "up to 100 tokens per sequence (max_model_len;" in description(config.model_copy(update={"max_model_len": 100}), BFLOAT16)
    assert "(" not in description(config.model_copy(update={"kv_memory": 2**40}), BFLOAT16)
