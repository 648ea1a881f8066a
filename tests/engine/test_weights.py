"""Every rank reads its slices and no more; a checkpoint that does not fit its config.json is refused with the names of what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.engine import checkpoint, weights
from baton.engine.config_json import load_spec
from baton.engine.devices import open_device
from baton.engine.layers import Decoder
from baton.engine.models import build_model
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.setting import Setting
from baton.engine.weights import Piece, checkpoint_files
from baton.errors import ConfigError
from tests.tiny_models import ARCHITECTURES, make_tiny

Tiny = Callable[[str], Path]


def build(model_dir: Path, placement: Placement, dtype: str = "auto") -> Decoder:
    return build_model(Setting(load_spec(model_dir, dtype), placement, Groups.alone(), open_device("cpu")))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tp_size", "dp_size", "coupled"), [(1, 1, False), (2, 1, False), (4, 1, False), (2, 2, True)])
def test_ranks_together_read_the_whole_checkpoint(arch: str, tp_size: int, dp_size: int, coupled: bool, tiny: Tiny) -> None:
    """Put every rank's slices back where they came from: nothing is missing, and nothing has two values."""
    whole = load_file(tiny(arch) / "model.safetensors")
    rebuilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    for rank in range(tp_size * dp_size):
        model = build(tiny(arch), Placement.of(rank, tp_size, dp_size, coupled))
        weights.load(tiny(arch), model.pieces(), model.spare())
        for piece in model.pieces():
            if piece.target.numel():
                torch.testing.assert_close(piece.target, whole[piece.name][piece.index], rtol=0, atol=0)
                rebuilt[piece.name][piece.index] = piece.target
    for name, tensor in whole.items():
        torch.testing.assert_close(rebuilt[name], tensor, rtol=0, atol=0, msg=name)


def test_a_checkpoint_of_many_files_is_the_same(tiny: Tiny, tmp_path: Path) -> None:
    sharded = make_tiny("qwen3_moe", tmp_path, max_shard_size="100KB")
    assert len(set(checkpoint_files(sharded).values())) > 3
    one, many = build(tiny("qwen3_moe"), Placement()), build(sharded, Placement())
    weights.load(tiny("qwen3_moe"), one.pieces())
    weights.load(sharded, many.pieces())
    for mine, theirs in zip(one.pieces(), many.pieces(), strict=True):
        assert mine.name == theirs.name and torch.equal(mine.target, theirs.target)


def test_progress_counts_to_the_end(tiny: Tiny) -> None:
    model, seen = build(tiny("qwen2"), Placement.of(1, 2)), list[tuple[int, int]]()
    done = weights.load(tiny("qwen2"), model.pieces(), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (done, done)
    assert done < (tiny("qwen2") / "model.safetensors").stat().st_size * 0.6


def test_dtype_is_converted(tiny: Tiny) -> None:
    model = build(tiny("llama"), Placement(), "bfloat16")
    weights.load(tiny("llama"), model.pieces())
    piece = next(iter(model.pieces()))
    assert torch.equal(piece.target, load_file(tiny("llama") / "model.safetensors")[piece.name].bfloat16())


BIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 8192,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}


def make_big(out: Path) -> int:
    """Write BIG in two files, linear layers as fp8 and the rest as bfloat16; the bytes of the largest tensor in bfloat16."""
    (out / "config.json").write_text(json.dumps(BIG))
    torch.manual_seed(0)
    shapes = {piece.name: piece.shape for piece in build(out, Placement()).pieces()}
    tensors = {name: torch.randn(shape[-1]).to(torch.bfloat16).expand(shape).contiguous() for name, shape in shapes.items()}
    for name in [name for name in shapes if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand([-(-size // 128) for size in shapes[name]])
    weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, out / file)
    (out / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return max(2 * tensor.numel() for tensor in tensors.values())


@pytest.mark.relay
def test_loading_takes_a_shard_and_a_little(tmp_path: Path) -> None:
    """Rank 0 of 4 holds its shard and a few rows, never a whole tensor, whatever it converts; loading_process.py explains the measure."""
    largest = make_big(tmp_path)
    command = [sys.executable, "-m", "tests.engine.loading_process", f"{tmp_path}=auto", f"{tmp_path}=w8a8"]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout
    for report in map(json.loads, printed.splitlines()):
        assert report["shard_bytes"] > largest * 0.9
        assert 0.9 * report["shard_bytes"] < report["peak_bytes"] < report["shard_bytes"] + largest / 4
    assert len(printed.splitlines()) == 2


def piece(name: str, *shape: int) -> Piece:
    return Piece(name, shape, (slice(None),) * len(shape), torch.empty(shape))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2), "lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    a, b = piece("a", 2, 3), piece("b", 2)
    with pytest.raises(ConfigError, match=r"lacks 9 tensors .*: x0, x1, x2, x3, x4, x5, x6, x7 and 1 more"):
        weights.load(tmp_path, [a, b, *(piece(f"x{i}", 1) for i in range(9))])
    with pytest.raises(ConfigError, match=r"holds 1 tensors .*: lm_head.weight"):
        weights.load(tmp_path, [a, b])
    with pytest.raises(ConfigError, match=r"a has shape \[2, 3\], config.json asks for \[3, 2\]"):
        weights.load(tmp_path, [piece("a", 3, 2), b], spare=("lm_head.weight",))
    assert weights.load(tmp_path, [a, b], spare=("lm_head.weight",)) == 32


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither"):
        checkpoint_files(tmp_path)
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match=r"missing: two\.safetensors"):
        checkpoint_files(tmp_path)


def test_a_broken_file_is_an_error_of_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / checkpoint.SINGLE).write_bytes((tiny("llama") / checkpoint.SINGLE).read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be read"):
        weights.load(tmp_path, [piece("a", 1)])
