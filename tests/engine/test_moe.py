"""Gates choose and weigh as transformers' do, bit for bit; experts give the same however the ranks of a domain share them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from baton.engine.checkpoint import SINGLE
from baton.engine.devices import open_device
from baton.engine.moe import Moe
from baton.engine.parallel import Groups, Rendezvous
from baton.engine.placement import Placement
from baton.engine.quantize import quantize_rows
from baton.engine.setting import Setting
from baton.engine.spec import GateSpec, ModelSpec, MoeSpec, RopeSpec
from baton.engine.weights import load
from baton.errors import ConfigError
from tests.engine.driving import TIMEOUT_S

DEVICE = open_device("cpu")
HIDDEN, WIDTH, NUM_EXPERTS, TOP_K = 32, 24, 8, 3
SHARED = 2


@dataclass(frozen=True)
class Drawn:
    """A gate over logits [T, num_experts] without ties."""

    gate: GateSpec
    logits: torch.Tensor
    bias: torch.Tensor


@st.composite
def gates(draw: st.DrawFn) -> Drawn:
    num_groups, per_group = draw(st.sampled_from((1, 2, 4))), draw(st.integers(2, 5))
    top_groups = draw(st.integers(1, num_groups))
    gate = GateSpec(
        top_k=draw(st.integers(1, top_groups * per_group)),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 2.5, 16.0))),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(0, 6)), num_groups * per_group)
    spread, shift = draw(st.sampled_from((0.1, 1.0, 20.0))), draw(st.sampled_from((0.0, -2.0, 5.0)))
    return Drawn(gate, spread * torch.randn(shape, generator=random), shift + torch.randn(shape[1], generator=random))


def through_identity(router: torch.nn.Module, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router of transformers says to these logits: weights, ids."""
    router.weight.data = torch.eye(logits.shape[1], dtype=logits.dtype)
    _, weights, ids = router(logits)
    return weights.detach(), ids


def assert_same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The same experts with the same weights, in any order, bit for bit."""
    for ids in (got[1], want[1]):
        assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert got[1].dtype == torch.int64
    assert got[0].dtype == want[0].dtype
    order, wanted_order = got[1].sort(dim=1), want[1].sort(dim=1)
    assert torch.equal(order.values, wanted_order.values)
    assert torch.equal(got[0].gather(1, order.indices), want[0].gather(1, wanted_order.indices))


@given(gates())
def test_the_gate_of_deepseek_v3(drawn: Drawn) -> None:
    gate, num_experts = replace(drawn.gate, scoring="sigmoid", biased=True, group_score="top2"), drawn.logits.shape[1]
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=num_experts,
            n_routed_experts=num_experts,
            num_experts_per_tok=gate.top_k,
            routed_scaling_factor=gate.scale,
            n_group=gate.num_groups,
            topk_group=gate.top_groups,
            norm_topk_prob=gate.normalize,
        )
    )
    router.e_score_correction_bias.copy_(drawn.bias)
    assert_same(DEVICE.route(drawn.logits, gate, drawn.bias), through_identity(router, drawn.logits))


@given(gates(), st.booleans())
def test_the_gate_of_deepseek_v2(drawn: Drawn, grouped: bool) -> None:
    gate, num_experts = replace(drawn.gate, normalize=False), drawn.logits.shape[1]
    if not grouped:
        gate = replace(gate, num_groups=1, top_groups=1)
    router = DeepseekV2TopkRouter(
        DeepseekV2Config(
            num_attention_heads=1,
            hidden_size=num_experts,
            n_routed_experts=num_experts,
            num_experts_per_tok=gate.top_k,
            routed_scaling_factor=gate.scale,
            n_group=gate.num_groups,
            topk_group=gate.top_groups,
            topk_method="group_limited_greedy" if grouped else "greedy",
        )
    )
    assert_same(DEVICE.route(drawn.logits, gate), through_identity(router, drawn.logits))


@given(gates(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_the_gate_of_qwen3_moe(drawn: Drawn, dtype: torch.dtype) -> None:
    """Also with the ties that logits of few bits have."""
    gate, logits = GateSpec(drawn.gate.top_k, normalize=drawn.gate.normalize), drawn.logits.to(dtype)
    config = Qwen3MoeConfig(
        hidden_size=logits.shape[1], num_experts=logits.shape[1], num_experts_per_tok=gate.top_k, norm_topk_prob=gate.normalize
    )
    weights, ids = DEVICE.route(logits, gate)
    assert weights.dtype == torch.float32
    assert_same((weights.to(dtype), ids), through_identity(Qwen3MoeTopKRouter(config), logits))


def test_a_biased_score_below_zero_is_still_better_than_another_group() -> None:
    gate = GateSpec(2, "sigmoid", normalize=True, biased=True, num_groups=2, top_groups=1, group_score="top2")
    bias = torch.tensor([-3.0, -3.0, -3.0, -9.0, -9.0, -9.0])
    weights, ids = DEVICE.route(torch.tensor([[2.0, 1.0, 0.0, 9.0, 9.0, 9.0]]), gate, bias)
    assert sorted(ids[0].tolist()) == [0, 1]
    assert weights.sum().item() == pytest.approx(1.0)


def test_scores_that_are_all_zero_weigh_nothing() -> None:
    weights, _ = DEVICE.route(torch.full((1, 4), -1e4), GateSpec(2, "sigmoid", normalize=True))
    assert weights.tolist() == [[0.0, 0.0]]


@dataclass(frozen=True, eq=False)
class Case:
    """A layer of transformers and what Baton's is told to be the same."""

    moe: MoeSpec
    float32_router: bool
    block: Any
    quantized: bool = False

    def routed_only(self) -> "Case":
        """Without shared experts."""
        return replace(self, moe=replace(self.moe, shared_intermediate=0))

    def rounded(self, dtype: str) -> "Case":
        """A copy in another dtype; the bias of a gate stays float32, as in every model of transformers."""
        block = copy.deepcopy(self.block).to(getattr(torch, dtype))
        if self.moe.gate.biased:
            block.gate.e_score_correction_bias = self.block.gate.e_score_correction_bias
        return replace(self, block=block)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a checkpoint names them."""
        kept = self.block.state_dict() if self.moe.shared_intermediate else self.block.gate.state_dict(prefix="gate.")
        named = {f"mlp.{name}": tensor for name, tensor in kept.items() if not name.startswith("experts.")}
        experts = self.block.experts.state_dict()
        for expert in range(NUM_EXPERTS):
            gate, up = experts["gate_up_proj"][expert].chunk(2)
            of_expert = {"gate_proj": gate, "up_proj": up, "down_proj": experts["down_proj"][expert]}
            named |= {f"mlp.experts.{expert}.{name}.weight": tensor for name, tensor in of_expert.items()}
        return named

    def spec(self, dtype: str = "float32") -> ModelSpec:
        """A model of this layer; most of it is of no concern here."""
        width = WIDTH * SHARED
        rest = {"rope": RopeSpec(1e4), "norm_eps": 1e-6, "tie_embeddings": False, "max_position_embeddings": 64}
        biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "qk_norm"), False)
        quantization = "w8a8" if self.quantized else None
        return ModelSpec("some", 1, HIDDEN, width, 4, 4, 8, 64, dtype=dtype, moe=self.moe, quantization=quantization, **rest, **biases)


SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_experts_per_tok": TOP_K}


def qwen3() -> Case:
    block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**SIZES, num_experts=NUM_EXPERTS, norm_topk_prob=True))
    return Case(MoeSpec(NUM_EXPERTS, WIDTH, GateSpec(TOP_K, normalize=True), (True,)), False, block)


def deepseek_v2() -> Case:
    grouped = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}
    block = DeepseekV2Moe(DeepseekV2Config(**SIZES, **grouped, n_routed_experts=NUM_EXPERTS, n_shared_experts=SHARED))
    gate = GateSpec(TOP_K, scale=3.0, num_groups=4, top_groups=2)
    return Case(MoeSpec(NUM_EXPERTS, WIDTH, gate, (True,), SHARED * WIDTH), True, block)


def deepseek_v3() -> Case:
    grouped = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    block = DeepseekV3MoE(DeepseekV3Config(**SIZES, **grouped, n_routed_experts=NUM_EXPERTS, n_shared_experts=SHARED))
    gate = GateSpec(TOP_K, "sigmoid", True, 2.5, True, num_groups=2, top_groups=1, group_score="top2")
    return Case(MoeSpec(NUM_EXPERTS, WIDTH, gate, (True,), SHARED * WIDTH), True, block)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    torch.manual_seed(7)
    made = {make.__name__: make() for make in (qwen3, deepseek_v2, deepseek_v3)}
    for case in made.values():
        case.block.experts.config._experts_implementation = "eager"
        with torch.no_grad():
            for tensor in case.block.state_dict().values():
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return made


def built(case: Case, setting: Setting) -> Moe:
    """The layer as this rank holds it, filled as a checkpoint would."""
    moe, tensors = Moe(setting, float32_router=case.float32_router), case.tensors()
    for piece in moe.pieces("mlp"):
        source = tensors.pop(piece.name)
        assert tuple(source.shape) == piece.shape
        if piece.scales is not None and piece.target.numel():
            values, scales = quantize_rows(source[piece.index])
            piece.target.copy_(values)
            piece.scales.copy_(scales[:, 0])
        elif piece.target.numel():
            piece.target.copy_(source[piece.index])
    assert not tensors, f"nobody asks for {sorted(tensors)}"
    return moe


def tokens(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn((num_tokens, HIDDEN), generator=torch.Generator().manual_seed(seed))


def theirs(block: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = block(x[None])[0]
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v2", "deepseek_v3"])
def test_routed_experts_equal_transformers_bit_for_bit(name: str, dtype: str, cases: dict[str, Case]) -> None:
    """Logits, weights and products have the precision that transformers gives them, and sums its order."""
    case = cases[name].routed_only().rounded(dtype)
    moe = built(case, Setting(case.spec(dtype), Placement(), Groups.alone(), DEVICE))
    for num_tokens in (1, 9, 40):
        x = tokens(num_tokens, num_tokens).to(case.block.gate.weight.dtype)
        with torch.inference_mode():
            _, weights, ids = case.block.gate(x)
            assert torch.equal(moe(x), case.block.experts(x, ids, weights))


@dataclass(frozen=True)
class Layout:
    """How ranks share the work, and how many tokens each data-parallel group brings, turn by turn."""

    tp_size: int
    dp_size: int = 1
    coupled: bool = False
    split_experts: bool = False
    turns: tuple[tuple[int, ...], ...] = ((7,), (0,), (1,))

    def placements(self) -> Iterator[Placement]:
        for rank in range(self.tp_size * self.dp_size):
            yield Placement.of(rank, self.tp_size, self.dp_size, self.coupled, self.split_experts)


LAYOUTS = {
    "tp2 by experts": Layout(2),
    "tp4 by experts": Layout(4),
    "tp2 by columns": Layout(2, split_experts=True),
    "tp4 by columns": Layout(4, split_experts=True),
    "dp2": Layout(1, 2, True, turns=((5, 3), (0, 6), (1, 0), (0, 0))),
    "tp2 dispatched": Layout(2, 1, True, turns=((5,), (1,), (0,))),
    "dp2 tp2": Layout(2, 2, True, turns=((5, 2), (0, 7), (1, 0), (0, 0))),
    "dp4": Layout(1, 4, True, turns=((0, 9, 0, 1), (2, 0, 0, 0), (3, 3, 3, 3))),
}


def play(placement: Placement, layout: Layout, cases: Sequence[Case], port: int) -> list[torch.Tensor]:
    """What one rank makes of its group's tokens, case by case and turn by turn, with weights in the device's form."""
    groups = Groups.connect(placement, "127.0.0.1", port, TIMEOUT_S)
    layers = [built(case, Setting(case.spec(), placement, groups, DEVICE)) for case in cases]
    for layer in layers:
        layer.prepare()
    outs = [moe(tokens(turn[placement.dp_rank], placement.dp_rank)) for moe in layers for turn in layout.turns]
    groups.close()
    return outs


Whole = Callable[[Case, torch.Tensor], torch.Tensor]


def check(layout: Layout, cases: Sequence[Case], whole: Whole, tolerance: float = 1e-5) -> None:
    """All ranks, in threads, have what `whole` says of the case and the tokens of their group."""
    placements, meeting = list(layout.placements()), Rendezvous("127.0.0.1", TIMEOUT_S)
    with ThreadPoolExecutor(len(placements)) as threads:
        ranks = [threads.submit(play, placement, layout, cases, meeting.port) for placement in placements]
        outs = [rank.result(TIMEOUT_S) for rank in ranks]
    meeting.close()
    asked = [(case, turn) for case in cases for turn in layout.turns]
    for placement, of_rank in zip(placements, outs, strict=True):
        for (case, turn), out in zip(asked, of_rank, strict=True):
            want = whole(case, tokens(turn[placement.dp_rank], placement.dp_rank))
            torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_way_of_sharing_equals_transformers(name: str, cases: dict[str, Case]) -> None:
    check(LAYOUTS[name], list(cases.values()), lambda case, x: theirs(case.block, x))


@pytest.mark.parametrize(("name", "tolerance"), [("dp2 tp2", 1e-5), ("tp2 by experts", 1e-5), ("tp2 by columns", 0.2)])
def test_quantized_experts_can_be_shared_as_well(name: str, tolerance: float, cases: dict[str, Case]) -> None:
    """Whole experts make the same integers anywhere; a slice of one has finer scales than the whole."""

    def alone(case: Case, x: torch.Tensor) -> torch.Tensor:
        return built(case, Setting(case.spec(), Placement(), Groups.alone(), DEVICE))(x)

    check(LAYOUTS[name], [replace(case.routed_only(), quantized=True) for case in cases.values()], alone, tolerance)


def test_what_does_not_divide_is_refused_before_anything_is_loaded(cases: dict[str, Case]) -> None:
    def attempt(tp_size: int, split_experts: bool) -> None:
        placement = Placement.of(0, tp_size, split_experts=split_experts)
        Moe(Setting(cases["qwen3"].spec(), placement, Groups.alone(), DEVICE))

    with pytest.raises(ConfigError, match=r"num_experts=8 does not divide by 3 ranks; .*prefill\.moe: tensor"):
        attempt(3, False)
    with pytest.raises(ConfigError, match=r"moe_intermediate_size=24 does not divide by 5 ranks; .*prefill\.moe: experts"):
        attempt(5, True)


def test_a_checkpoint_of_fused_experts_is_refused_by_name(cases: dict[str, Case], tmp_path: Path) -> None:
    save_file({f"mlp.{name}": tensor for name, tensor in cases["qwen3"].block.state_dict().items()}, tmp_path / SINGLE)
    moe = Moe(Setting(cases["qwen3"].spec(), Placement(), Groups.alone(), DEVICE))
    with pytest.raises(ConfigError, match=r"mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj.*save_original_format"):
        load(tmp_path, moe.pieces("mlp"))
