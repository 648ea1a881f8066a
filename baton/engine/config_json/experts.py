"""The experts of a config.json -> MoeSpec, for every architecture that has some. Knows names and defaults, no tensors.

Each gate follows its class in transformers, including what that class leaves out: DeepSeek-V2's never normalises the chosen scores,
whatever `norm_topk_prob` says (nor did DeepSeek's own code multiply and normalise at once), so the field is not read there.
"""

from __future__ import annotations

from baton.engine.config_json.fields import Config, Fields
from baton.engine.spec import GateSpec, MoeSpec
from baton.errors import ConfigError

_V2_METHODS = ("greedy", "group_limited_greedy")


def moe_spec(model_type: str, config: Config) -> MoeSpec | None:
    """The routed experts of a model, None for one without. Raises ConfigError for numbers that cannot be."""
    readers = {"qwen3_moe": _qwen3, "deepseek_v2": _deepseek_v2, "deepseek_v3": _deepseek_v3}
    if model_type not in readers:
        return None
    moe = readers[model_type](Fields(config))
    check_gate(moe.gate, moe.num_experts)
    return moe


def check_gate(gate: GateSpec, num_experts: int) -> None:
    """Raise ConfigError, with the numbers, for a choice that cannot be made."""
    if gate.top_k > num_experts:
        raise ConfigError(f"num_experts_per_tok={gate.top_k} must be between 1 and num_experts={num_experts}")
    if num_experts % gate.num_groups:
        raise ConfigError(f"n_group={gate.num_groups} does not divide num_experts={num_experts}")
    if gate.top_groups > gate.num_groups:
        raise ConfigError(f"topk_group={gate.top_groups} must be between 1 and n_group={gate.num_groups}")
    per_group = num_experts // gate.num_groups
    if gate.top_k > gate.top_groups * per_group:
        within = f"topk_group={gate.top_groups} groups of {per_group} experts"
        raise ConfigError(f"num_experts_per_tok={gate.top_k} cannot be chosen from {within}")
    if gate.group_score == "top2" and per_group < 2:
        raise ConfigError(f"n_group={gate.num_groups} leaves 1 of {num_experts} experts per group; a group counts by its two best")


def _qwen3(config: Fields) -> MoeSpec:
    dense, step = config.listed("mlp_only_layers"), config.count("decoder_sparse_step", 1)
    name = "num_experts" if config.given("num_experts") else "num_local_experts"
    return MoeSpec(
        num_experts=config.count(name, 128),
        intermediate=config.count("moe_intermediate_size", 768),
        gate=GateSpec(config.count("num_experts_per_tok", 8), normalize=config.flag("norm_topk_prob")),
        sparse_layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(config.count("num_hidden_layers"))),
    )


def _deepseek_v2(config: Fields) -> MoeSpec:
    config.choice("scoring_func", ("softmax",), "softmax")
    grouped = config.choice("topk_method", _V2_METHODS, "greedy") == "group_limited_greedy"
    gate = GateSpec(
        top_k=config.count("num_experts_per_tok"),
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.count("n_group") if grouped else 1,
        top_groups=config.count("topk_group") if grouped else 1,
    )
    return _deepseek(config, gate, num_experts=64, intermediate=1407, num_shared=2, first_sparse=0)


def _deepseek_v3(config: Fields) -> MoeSpec:
    config.choice("scoring_func", ("sigmoid",), "sigmoid")
    config.choice("topk_method", ("noaux_tc",), "noaux_tc")
    gate = GateSpec(
        top_k=config.count("num_experts_per_tok", 8),
        scoring="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        biased=True,
        num_groups=config.count("n_group", 8),
        top_groups=config.count("topk_group", 4),
        group_score="top2",
    )
    return _deepseek(config, gate, num_experts=256, intermediate=2048, num_shared=1, first_sparse=3)


def _deepseek(config: Fields, gate: GateSpec, num_experts: int, intermediate: int, num_shared: int, first_sparse: int) -> MoeSpec:
    """moe_layer_freq is a field of the hub's configurations only, there always 1; transformers has no such layers."""
    width = config.count("moe_intermediate_size", intermediate)
    first, step = config.count("first_k_dense_replace", first_sparse, least=0), config.count("moe_layer_freq", 1)
    return MoeSpec(
        num_experts=config.count("n_routed_experts", num_experts),
        intermediate=width,
        gate=gate,
        sparse_layers=tuple(layer >= first and layer % step == 0 for layer in range(config.count("num_hidden_layers"))),
        shared_intermediate=config.count("n_shared_experts", num_shared, least=0) * width,
    )
