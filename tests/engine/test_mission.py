"""The models that Baton is for: their real configurations are read rightly, and every rank of the layouts they run in holds its share.

Built on torch's "meta" device, which has shapes and no memory, so that a model of 671 billion parameters takes seconds.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.config_json import spec_from_config
from baton.engine.devices.cpu import CpuDevice
from baton.engine.fits import Role, SplitMoe, check_node, place
from baton.engine.kv_shape import KVShape
from baton.engine.models import build_model
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.setting import Setting
from baton.engine.spec import GateSpec, Llama3Scaling, MlaSpec, ModelSpec, RopeSpec, YarnScaling
from baton.engine.weights import Piece
from baton.errors import ConfigError
from tests.mission_configs import CONFIGS, NUM_PARAMETERS

SPECS = {name: spec_from_config(config) for name, config in CONFIGS.items()}
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """A node of dp x tp ranks."""

    role: Role
    tp: int
    dp: int = 1
    moe: SplitMoe = "experts"

    def placements(self, spec: ModelSpec) -> list[Placement]:
        check_node(spec, self.role, self.tp, self.dp, self.moe)
        return [place(spec, self.role, rank, self.tp, self.dp, self.moe) for rank in range(self.tp * self.dp)]


LAYOUTS = [
    ("Qwen2.5-7B-Instruct", Layout("prefill", 1)),
    ("Qwen2.5-7B-Instruct", Layout("decode", 4)),
    ("Qwen3-8B", Layout("prefill", 2)),
    ("Qwen3-8B", Layout("decode", 1, 2)),
    ("Qwen3-30B-A3B", Layout("prefill", 2)),
    ("Qwen3-30B-A3B", Layout("prefill", 4, moe="tensor")),
    ("Qwen3-30B-A3B", Layout("decode", 8)),
    ("Qwen3-30B-A3B", Layout("decode", 2, 4)),
    ("Qwen2-72B-Instruct", Layout("prefill", 8)),
    ("Qwen2-72B-Instruct", Layout("decode", 4, 2)),
    ("Llama-3.1-70B-Instruct", Layout("prefill", 4)),
    ("Llama-3.1-70B-Instruct", Layout("decode", 16)),
    ("DeepSeek-V2-Lite", Layout("prefill", 2)),
    ("DeepSeek-V2-Lite", Layout("prefill", 2, moe="tensor")),
    ("DeepSeek-V2-Lite", Layout("decode", 1, 4)),
    ("DeepSeek-V2-Lite", Layout("decode", 2, 2)),
    ("DeepSeek-V3", Layout("prefill", 16)),
    ("DeepSeek-V3", Layout("prefill", 16, moe="tensor")),
    ("DeepSeek-V3", Layout("decode", 1, 16)),
    ("DeepSeek-V3", Layout("decode", 4, 8)),
]


class MetaDevice(CpuDevice):
    """Allocates nothing and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        made = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        self.num_bytes += made.nbytes
        return made


def built(spec: ModelSpec, placement: Placement) -> tuple[Any, int]:
    """A rank's model without memory, and the bytes it would take."""
    device = MetaDevice()
    model = build_model(Setting(spec, placement, Groups.alone(), device))
    return model, device.num_bytes


def shallow(spec: ModelSpec) -> ModelSpec:
    """With one layer of each kind: the others of a kind differ in their name only."""
    if spec.moe is None:
        return replace(spec, num_layers=1)
    kinds = tuple(sorted(set(spec.moe.sparse_layers)))
    return replace(spec, num_layers=len(kinds), moe=replace(spec.moe, sparse_layers=kinds))


def box(piece: Piece) -> Box:
    """What of its tensor a piece reads."""
    return tuple(part.indices(size)[:2] for part, size in zip(piece.index, piece.shape, strict=True))


def volume(sides: Box) -> int:
    return math.prod(stop - start for start, stop in sides)


def overlap(one: Box, other: Box) -> bool:
    return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_all_parameters_are_read_and_none_else(name: str) -> None:
    model, _ = built(SPECS[name], Placement())
    shapes = {piece.name: piece.shape for piece in model.pieces()}
    assert sum(math.prod(shape) for shape in shapes.values()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_ranks_cover_every_tensor_exactly_once_or_as_replicas(name: str, layout: Layout) -> None:
    spec = shallow(SPECS[name])
    placements = layout.placements(spec)
    holders: dict[str, Counter[Box]] = defaultdict(Counter)
    shapes: dict[str, tuple[int, ...]] = {}
    for placement in placements:
        for piece in built(spec, placement)[0].pieces():
            assert shapes.setdefault(piece.name, piece.shape) == piece.shape
            if piece.target.numel():
                assert tuple(piece.target.shape) == tuple(stop - start for start, stop in box(piece)), piece.name
                holders[piece.name][box(piece)] += 1
    assert holders.keys() == shapes.keys(), "every tensor is read by someone"
    for tensor, boxes in holders.items():
        listed = list(boxes)
        assert sum(map(volume, listed)) == math.prod(shapes[tensor]), tensor
        assert not any(overlap(one, other) for i, one in enumerate(listed) for other in listed[:i]), tensor
        assert set(boxes.values()) == {replicas(tensor, spec, placements[0])}, tensor


def replicas(tensor: str, spec: ModelSpec, place: Placement) -> int:
    """How many ranks of a node hold the same part of a tensor."""
    if ".mlp.experts." in tensor:
        return 1
    if any(part in tensor for part in ("norm.", ".mlp.gate.", "_a_proj")):
        return place.dp_size * place.tp_size
    if ".k_proj." in tensor or ".v_proj." in tensor:
        return place.dp_size * max(1, place.tp_size // spec.kv_heads)
    return place.dp_size


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_all_that_is_allocated_is_filled(name: str, layout: Layout) -> None:
    spec = shallow(SPECS[name])
    for placement in layout.placements(spec):
        model, num_bytes = built(spec, placement)
        tables = 1 if spec.tie_embeddings else 2
        padding = -(-spec.vocab // placement.tp_size) - len(placement.vocab(spec.vocab))
        filled = sum(piece.nbytes for piece in model.pieces())
        assert filled + tables * padding * spec.hidden * spec.dtype_bytes == num_bytes


def test_names_of_all_layers_follow_those_of_their_kind() -> None:
    """Why one layer of each kind is enough above: here all 61 of DeepSeek-V3 are there, under their own names."""
    spec = SPECS["DeepSeek-V3"]
    assert spec.moe is not None
    suffixes: dict[int, set[str]] = defaultdict(set)
    for piece in built(spec, Placement())[0].pieces():
        if piece.name.startswith("model.layers."):
            number, suffix = piece.name.removeprefix("model.layers.").split(".", 1)
            suffixes[int(number)].add(f"{suffix} {piece.shape}")
    assert sorted(suffixes) == list(range(61))
    for layer in range(61):
        assert suffixes[layer] == suffixes[60 if spec.sparse(layer) else 0]


def test_layers_of_multi_token_prediction_are_spared() -> None:
    model, _ = built(SPECS["DeepSeek-V3"], Placement())
    assert any("model.layers.61.mlp.experts.0.up_proj.weight".startswith(name) for name in model.spare())
    assert not any(piece.name.startswith(model.spare()) for piece in model.pieces())


@pytest.mark.parametrize(
    ("name", "layout", "gigabytes"),
    [
        ("Qwen2.5-7B-Instruct", Layout("prefill", 1), 15.23),
        ("Qwen3-8B", Layout("decode", 1, 2), 16.38),
        ("Qwen3-30B-A3B", Layout("decode", 1, 8), 10.33),
        ("Qwen3-30B-A3B", Layout("prefill", 4, moe="tensor"), 15.29),
        ("Qwen2-72B-Instruct", Layout("prefill", 8), 18.18),
        ("Llama-3.1-70B-Instruct", Layout("decode", 4), 35.28),
        ("DeepSeek-V2-Lite", Layout("decode", 1, 4), 9.828),
        ("DeepSeek-V3", Layout("decode", 1, 16), 116.19),
        ("DeepSeek-V3", Layout("prefill", 16), 86.02),
    ],
)
def test_bytes_per_rank(name: str, layout: Layout, gigabytes: float) -> None:
    spec = SPECS[name]
    for placement in (layout.placements(spec)[0], layout.placements(spec)[-1]):
        _, num_bytes = built(spec, placement)
        assert num_bytes == pytest.approx(gigabytes * 1e9, rel=0.001)


def test_int8_halves_what_is_not_a_table() -> None:
    spec, layout = SPECS["DeepSeek-V3"], Layout("decode", 1, 16)
    placement = layout.placements(spec)[0]
    _, num_bytes = built(replace(spec, quantization="w8a8"), placement)
    tables = 2 * spec.vocab * spec.hidden * spec.dtype_bytes
    assert num_bytes - tables == pytest.approx((built(spec, placement)[1] - tables) / 2, rel=0.03)


DENSE = {"tie_embeddings": False, "output_bias": False, "mlp_bias": False, "dtype": "bfloat16", "mla": None, "quantization": None}
QWEN_ROPE, QWEN3_SHAPE = RopeSpec(1000000.0), {"heads": 32, "head_dim": 128, "vocab": 151936, "norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen2.5-7B-Instruct", {"model_type": "qwen2", "num_layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "head_dim": 128}),
        ("Qwen2.5-7B-Instruct", {**DENSE, "qkv_bias": True, "qk_norm": False, "rope": QWEN_ROPE, "max_position_embeddings": 32768}),
        ("Qwen2-72B-Instruct", {**DENSE, "num_layers": 80, "hidden": 8192, "intermediate": 29568, "kv_heads": 8, "qkv_bias": True}),
        ("Qwen3-8B", {**DENSE, **QWEN3_SHAPE, "qk_norm": True, "qkv_bias": False, "rope": QWEN_ROPE, "kv_heads": 8, "moe": None}),
        ("Qwen3-30B-A3B", {**DENSE, **QWEN3_SHAPE, "qk_norm": True, "kv_heads": 4, "max_position_embeddings": 40960}),
        ("Llama-3.1-70B-Instruct", {**DENSE, "rope": RopeSpec(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)), "norm_eps": 1e-5}),
        ("Llama-3.1-70B-Instruct", {"qkv_bias": False, "max_position_embeddings": 131072, "vocab": 128256, "softmax_scale": 128**-0.5}),
        ("DeepSeek-V2-Lite", {"mla": MlaSpec(None, 512, 128, 64, 128), "heads": 16, "kv_heads": 1, "head_dim": 576, "num_mtp_layers": 0}),
        ("DeepSeek-V3", {"mla": MlaSpec(1536, 512, 128, 64, 128), "heads": 128, "kv_heads": 1, "head_dim": 576, "num_mtp_layers": 1}),
        ("DeepSeek-V3", {"dtype": "bfloat16", "quantization": None, "max_position_embeddings": 163840, "part_dims": (576,)}),
    ],
)
def test_configurations_are_read(name: str, said: dict[str, Any]) -> None:
    assert {field: getattr(SPECS[name], field) for field in said} == said


def test_experts_and_ropes_are_read() -> None:
    qwen, lite, full = (SPECS[name] for name in ("Qwen3-30B-A3B", "DeepSeek-V2-Lite", "DeepSeek-V3"))
    assert qwen.moe is not None and lite.moe is not None and full.moe is not None
    assert (qwen.moe.num_experts, qwen.moe.intermediate, qwen.moe.gate) == (128, 768, GateSpec(8, normalize=True))
    assert qwen.moe.sparse_layers == (True,) * 48 and qwen.moe.shared_intermediate == 0
    assert (lite.moe.num_experts, lite.moe.intermediate, lite.moe.gate, lite.moe.shared_intermediate) == (64, 1408, GateSpec(6), 2816)
    assert lite.moe.sparse_layers == (False, *(True,) * 26)
    gate = GateSpec(8, "sigmoid", normalize=True, scale=2.5, biased=True, num_groups=8, top_groups=4, group_score="top2")
    assert (full.moe.num_experts, full.moe.intermediate, full.moe.gate, full.moe.shared_intermediate) == (256, 2048, gate, 2048)
    assert full.moe.sparse_layers == (*(False,) * 3, *(True,) * 58)
    yarn = YarnScaling(40.0, 4096, 32.0, 1.0, attention_factor=1.0)
    assert lite.rope == full.rope == RopeSpec(10000.0, yarn, interleaved=True)
    assert lite.softmax_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)


@st.composite
def odd_specs(draw: st.DrawFn) -> ModelSpec:
    """Small models of every kind whose numbers often do not divide."""
    base = shallow(SPECS[draw(st.sampled_from(sorted(SPECS)))])
    kv_heads = 1 if base.mla else draw(st.integers(1, 6))
    heads = kv_heads * draw(st.integers(1, 6))
    small = replace(base, hidden=8, vocab=16, heads=heads, kv_heads=kv_heads, intermediate=draw(st.integers(1, 24)))
    if small.moe is None:
        return small
    kinds = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=2)))
    shared = draw(st.integers(1, 12)) if small.moe.shared_intermediate else 0
    widths = {"num_experts": draw(st.integers(1, 12)), "intermediate": draw(st.integers(1, 12)), "shared_intermediate": shared}
    return replace(small, num_layers=len(kinds), moe=replace(small.moe, sparse_layers=kinds, **widths))


@settings(max_examples=300)
@given(odd_specs(), st.sampled_from(["prefill", "decode"]), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["experts", "tensor"]))
def test_what_is_refused_early_is_what_some_rank_could_not_build(spec: ModelSpec, role: Role, tp: int, dp: int, moe: SplitMoe) -> None:
    dp = 1 if role == "prefill" else dp
    try:
        for rank in range(tp * dp):
            placement = place(spec, role, rank, tp, dp, moe)
            built(spec, placement)
            KVShape.of(spec, placement, 16)
    except ConfigError:
        with pytest.raises(ConfigError):
            check_node(spec, role, tp, dp, moe)
    else:
        check_node(spec, role, tp, dp, moe)
