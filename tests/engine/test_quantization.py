"""Quantized checkpoints: what they hold arrives, sliced anywhere; a model computes nearly the same with it; others are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baton.engine import weights
from baton.engine.batch import Batch, Row
from baton.engine.checkpoint import SINGLE
from baton.engine.config_json import load_spec
from baton.engine.devices import open_device
from baton.engine.layers import Decoder
from baton.engine.models import build_model
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.quantize import dequantize_blocks
from baton.engine.setting import Setting
from baton.engine.weights import Piece
from baton.errors import ConfigError
from tests import quantized_checkpoints
from tests.engine.driving import Job, asks, lead, make_rank, make_runner, run_in_threads
from tests.engine.golden import assert_equal, expected
from tests.quantized_checkpoints import fp8_blocks, from_fp8_blocks
from tests.tiny_models import tiny_config

Tiny = Callable[[str], Path]
Quantized = Callable[[str, str], Path]
ASKS = asks(1, (1, 3, 8, 17, 41, 66))


@pytest.fixture(scope="session")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """quantized(arch, kind) is a tiny checkpoint turned into another by the function `kind` of tests/quantized_checkpoints.py."""
    makers = {
        "compressed_tensors": quantized_checkpoints.compressed_tensors,
        "modelslim": quantized_checkpoints.modelslim,
        "fp8": quantized_checkpoints.fp8,
        "fp8_turned_back": quantized_checkpoints.fp8_turned_back,
    }
    return cache(lambda arch, kind: makers[kind](tiny(arch), tmp_path_factory.mktemp("quantized") / kind))


def loaded(model_dir: Path, quantization: str = "auto", placement: Placement | None = None) -> Decoder:
    spec = load_spec(model_dir, quantization=quantization)
    model = build_model(Setting(spec, placement or Placement(), Groups.alone(), open_device("cpu")))
    weights.load(model_dir, model.pieces(), model.spare())
    return model


def logits(model_dir: Path, quantization: str = "auto", dtype: str = "float32") -> torch.Tensor:
    """After every token of a prompt of 200, [200, vocab] float32."""
    rank = make_rank(model_dir, Placement(), Groups.alone(), dtype, quantization)
    batch = Batch.build([Row(asks(5, [200])[0].prompt, 0, range(25))])
    found = rank.logits(replace(batch, sample_rows=np.arange(200, dtype=np.int32)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", "compressed_tensors"), ("qwen3_moe", "compressed_tensors"), ("llama", "modelslim"), ("deepseek_v3", "modelslim")],
)
def test_ready_is_what_loading_makes(arch: str, kind: str, tiny: Tiny, quantized: Quantized) -> None:
    """The same integers and scales, bit for bit, from a ready checkpoint and from the plain one."""
    ready, made = loaded(quantized(arch, kind)), loaded(tiny(arch), "w8a8")
    num_quantized = 0
    for mine, theirs in zip(ready.pieces(), made.pieces(), strict=True):
        assert mine.name == theirs.name and torch.equal(mine.target, theirs.target)
        if mine.scales is not None:
            assert theirs.scales is not None and torch.equal(mine.scales, theirs.scales)
            num_quantized += 1
    assert num_quantized > 10


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["compressed_tensors", "modelslim", "fp8"])
def test_ranks_together_read_a_quantized_checkpoint(arch: str, kind: str, quantized: Quantized) -> None:
    """Two ranks hold, in their slices, exactly what one holds; row-parallel ones too, for a ready scale is of the whole row."""
    whole = {piece.name: piece for piece in loaded(quantized(arch, kind)).pieces()}
    for rank in range(2):
        for piece in loaded(quantized(arch, kind), placement=Placement.of(rank, 2)).pieces():
            if piece.target.numel():
                assert torch.equal(piece.target, whole[piece.name].target[piece.index])
                assert piece.scales is None or torch.equal(piece.scales, whole[piece.name].scales[piece.index[0]])


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "deepseek_v3"])
def test_int8_is_close_to_float(arch: str, tiny: Tiny) -> None:
    """It moves logits by no more than three times what bfloat16 does; measured on all tiny models: 1.5 to 2.2 times."""
    plain = logits(tiny(arch))
    int8, half = (float((other - plain).norm()) for other in (logits(tiny(arch), "w8a8"), logits(tiny(arch), dtype="bfloat16")))
    assert half < int8 < 3 * half


def test_the_order_of_work_changes_nothing(quantized: Quantized) -> None:
    """Alone, in mixed batches, in chunks: the same tokens, though rounding magnifies what attention's order of sums leaves."""
    runner = make_runner(quantized("qwen3_moe", "compressed_tensors"), Placement(), Groups.alone())
    alone = [lead(runner, [ask])[0] for ask in ASKS]
    for seed in (1, 2):
        assert [[token for token, _ in tokens] for tokens in lead(runner, ASKS, seed)] == [
            [token for token, _ in tokens] for tokens in alone
        ]


def test_two_ranks_are_close_to_one(quantized: Quantized) -> None:
    """Not equal: each quantizes the columns of an activation that it has."""
    model_dir = quantized("llama", "compressed_tensors")
    one = lead(make_runner(model_dir, Placement(), Groups.alone()), ASKS)
    two = run_in_threads(Job(model_dir, 2, 1, False, (tuple(ASKS),)))[0]
    firsts = [(mine[0], theirs[0]) for mine, theirs in zip(one, two, strict=True)]
    same = [(mine[1], theirs[1]) for mine, theirs in firsts if mine[0] == theirs[0]]
    assert len(same) >= len(ASKS) - 1
    np.testing.assert_allclose(*zip(*same, strict=True), atol=0.25)


def test_fp8_is_turned_back(quantized: Quantized) -> None:
    """Latent attention included, whose kv_b_proj is read in runs of rows, head by head."""
    runner = make_runner(quantized("deepseek_v3", "fp8"), Placement(), Groups.alone(), "float32")
    assert_equal(lead(runner, ASKS[:4]), expected(quantized("deepseek_v3", "fp8_turned_back"), ASKS[:4]))


def test_fp8_of_many_blocks_equals_transformers(tmp_path: Path) -> None:
    """Widths that are no multiple of 128, on two ranks, whose slices begin within blocks."""
    config = tiny_config("llama_tied")
    config.hidden_size, config.intermediate_size = 208, 328
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    stored = quantized_checkpoints.fp8(tmp_path / "plain", tmp_path / "fp8")
    turned_back = quantized_checkpoints.fp8_turned_back(tmp_path / "plain", tmp_path / "turned_back")
    got = run_in_threads(Job(stored, 2, 1, False, (tuple(ASKS[:3]),)))[0]
    assert_equal(got, expected(turned_back, ASKS[:3]))


def test_fp8_becomes_int8(quantized: Quantized) -> None:
    """By way of float32, as the checkpoint turned back does."""
    from_fp8, from_float = loaded(quantized("llama", "fp8"), "w8a8"), loaded(quantized("llama", "fp8_turned_back"), "w8a8")
    for mine, theirs in zip(from_fp8.pieces(), from_float.pieces(), strict=True):
        assert torch.equal(mine.target, theirs.target)


sizes = st.integers(1, 300)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), sizes, sizes)
def test_slices_of_fp8_begin_anywhere(tmp_path: Path, data: st.DataObject, rows: int, columns: int) -> None:
    """A piece is the slice of what turning back the whole tensor gives, into any dtype."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    values, scales = fp8_blocks(weight)
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path / SINGLE)
    index = slice_of(data, rows), slice_of(data, columns)
    whole = from_fp8_blocks(values, scales)[index]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    piece = Piece("a.weight", (rows, columns), index, torch.empty(whole.shape, dtype=dtype))
    weights.load(tmp_path, [piece])
    assert torch.equal(piece.target, whole.to(dtype))
    assert torch.equal(dequantize_blocks(values[index], scales, index[0].start, index[1].start), whole)


def slice_of(data: st.DataObject, size: int) -> slice:
    start = data.draw(st.integers(0, size - 1))
    return slice(start, data.draw(st.integers(start + 1, size)))


def test_int8_turns_back_where_a_model_keeps_floats(quantized: Quantized) -> None:
    """As for a latent projection that llm-compressor quantizes and Baton does not."""
    stored = load_file(quantized("llama", "compressed_tensors") / SINGLE)
    name = "model.layers.0.self_attn.o_proj.weight"
    piece = Piece(name, (64, 64), (slice(5, 50), slice(16, 32)), torch.empty(45, 16))
    weights.load(quantized("llama", "compressed_tensors"), [piece], spare=["model.", "lm_head."])
    assert torch.equal(piece.target, stored[name][5:50, 16:32].float() * stored[f"{name}_scale"][5:50])


INT8 = {"a.weight": torch.ones(4, 6, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
FP8 = {"a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**INT8, "a.weight_offset": torch.ones(4, 1)}, r"a\.weight_offset is not zero"),
        ({**INT8, "a.weight_zero_point": torch.ones(4, 1, dtype=torch.int8)}, r"a\.weight_zero_point is not zero"),
        ({**INT8, "a.weight_scale": torch.ones(1)}, r"a\.weight_scale has shape \[1\], known is \[4, 1\]: one per row of a\.weight"),
        ({"a.weight": INT8["a.weight"]}, r"lacks a\.weight_scale, without which a\.weight \(dtype I8\) means nothing"),
        ({"a.weight": FP8["a.weight"]}, r"lacks a\.weight_scale_inv, without which"),
        (
            {**FP8, "a.weight_scale_inv": torch.ones(4, 6)},
            r"a\.weight_scale_inv has shape \[4, 6\], known is \[1, 1\]: one per block of 128",
        ),
        ({**FP8, "a.weight_scale": torch.ones(4, 1)}, r"a\.weight has dtype F8_E4M3 and yet a companion a\.weight_scale"),
        ({**INT8, "a.weight": torch.ones(4, 6)}, r"a\.weight has dtype F32 and yet a companion a\.weight_scale"),
        ({"a.weight": torch.ones(4, 6, dtype=torch.int32)}, r"a\.weight has dtype I32; known are F64, F32"),
        ({**INT8, "a.deq_scale": torch.ones(4), "a.input_scale": torch.ones(1)}, r"static scales.*: a\.deq_scale, a\.input_scale"),
        ({**INT8, "b.weight_scale": torch.ones(4, 1)}, r"holds 1 tensors that config\.json does not ask for: b\.weight_scale"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / SINGLE)
    target = torch.empty(4, 6)
    with pytest.raises(ConfigError, match=message):
        weights.load(tmp_path, [Piece("a.weight", (4, 6), (slice(None), slice(None)), target)])


def test_symmetric_offsets_and_flat_scales_are_taken(tmp_path: Path) -> None:
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    save_file({**INT8, "a.weight_scale": scales.bfloat16(), "a.weight_offset": torch.zeros(4, 1)}, tmp_path / SINGLE)
    target = torch.empty(2, 6)
    weights.load(tmp_path, [Piece("a.weight", (4, 6), (slice(1, 3), slice(None)), target)])
    assert torch.equal(target, scales[1:3, None].expand(2, 6))


def test_files_of_modelslim_are_found_and_never_mixed_up(quantized: Quantized, tmp_path: Path) -> None:
    files = weights.checkpoint_files(quantized("llama", "modelslim"))
    assert {path.name for path in files.values()} == {f"quant_model_weights-0000{number}-of-00002.safetensors" for number in (1, 2)}
    save_file(INT8, tmp_path / "quant_model_weight_w8a8_dynamic.safetensors")
    assert set(weights.checkpoint_files(tmp_path)) == set(INT8)
    save_file(INT8, tmp_path / "quant_model_weights.safetensors")
    with pytest.raises(
        ConfigError, match=r"holds quant_model_weight_w8a8_dynamic\.safetensors, quant_model_weights\.safetensors, and no index"
    ):
        weights.checkpoint_files(tmp_path)
    (tmp_path / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ConfigError, match="holds no weight_map"):
        weights.checkpoint_files(tmp_path)


def test_a_spared_prefix_spares_what_begins_with_it(tmp_path: Path) -> None:
    save_file({**INT8, "mtp.b.weight": torch.ones(2)}, tmp_path / SINGLE)
    piece = Piece("a.weight", (4, 6), (slice(None), slice(None)), torch.empty(4, 6))
    assert weights.load(tmp_path, [piece], spare=["mtp."]) == 4 * 6 * 4
    with pytest.raises(ConfigError, match=r"mtp\.b\.weight"):
        weights.load(tmp_path, [piece], spare=["mtp"])
