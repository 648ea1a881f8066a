"""A model that cannot be shared out as asked is refused with the numbers, by the same arithmetic that the layers use."""

from dataclasses import replace

import pytest

from baton.engine.config_json import spec_from_config
from baton.engine.fits import Role, SplitMoe, check_node, place
from baton.engine.placement import Placement
from baton.engine.spec import GateSpec, ModelSpec, MoeSpec
from baton.errors import ConfigError
from tests.mission_configs import CONFIGS

SPECS = {name: spec_from_config(config) for name, config in CONFIGS.items()}


def with_experts(num_experts: int, intermediate: int = 64, shared: int = 0) -> ModelSpec:
    """Every layer sparse, so that the width of dense MLPs does not matter."""
    base = replace(SPECS["Qwen3-8B"], num_layers=2, intermediate=7)
    return replace(base, moe=MoeSpec(num_experts, intermediate, GateSpec(1), (True, True), shared))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_model_of_the_mission_fits_its_layouts(name: str, tp: int) -> None:
    for moe in ("experts", "tensor"):
        check_node(SPECS[name], "prefill", tp, moe=moe)
    for dp in (1, 2, 4):
        check_node(SPECS[name], "decode", tp, dp)


@pytest.mark.parametrize(
    ("spec", "role", "tp", "dp", "moe", "said"),
    [
        (with_experts(9), "decode", 2, 2, "experts", ["decode node of dp=2 x tp=2", "num_experts=9 does not divide by 4 ranks"]),
        (with_experts(9), "prefill", 2, 1, "experts", ["prefill node of tp=2", "num_experts=9 does not divide by 2 ranks"]),
        (with_experts(8, 63), "prefill", 2, 1, "tensor", ["moe_intermediate_size=63 does not divide by 2 ranks"]),
        (with_experts(8, 64, shared=63), "decode", 2, 1, "experts", ["=63 does not divide by 2 ranks"]),
        (SPECS["Qwen2.5-7B-Instruct"], "prefill", 8, 1, "experts", ["tp=8", "num_attention_heads=28 does not divide by 8 ranks"]),
        (replace(SPECS["Qwen3-8B"], kv_heads=6, heads=24), "decode", 4, 1, "experts", ["num_key_value_heads=6"]),
        (replace(SPECS["Qwen3-8B"], kv_heads=3, heads=24), "decode", 4, 1, "experts", ["num_key_value_heads=3 neither"]),
        (replace(SPECS["Qwen3-8B"], intermediate=7), "decode", 2, 1, "experts", ["intermediate_size=7 does not divide by 2 ranks"]),
    ],
)
def test_a_refusal_has_the_numbers(spec: ModelSpec, role: Role, tp: int, dp: int, moe: SplitMoe, said: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_node(spec, role, tp, dp, moe)
    for words in said:
        assert words in refusal.value.message


def test_experts_that_are_split_need_not_divide_in_number() -> None:
    check_node(with_experts(9), "prefill", 2, moe="tensor")
    check_node(with_experts(9), "decode", 1, 3)
    check_node(with_experts(8, 63), "prefill", 2)


def test_ranks_are_placed_as_their_role_needs_it() -> None:
    dense, sparse = SPECS["Qwen3-8B"], SPECS["Qwen3-30B-A3B"]
    assert place(dense, "decode", 3, 2, 2) == Placement(1, 2, 1, 2)
    assert place(sparse, "decode", 3, 2, 2) == Placement(1, 2, 1, 2, coupled=True)
    assert place(sparse, "decode", 1, 2, 1, "tensor") == Placement(1, 2, 0, 1, coupled=True), "a setting of prefill"
    assert place(sparse, "prefill", 1, 2) == Placement(1, 2)
    assert place(sparse, "prefill", 1, 2, moe="tensor") == Placement(1, 2, split_experts=True)
