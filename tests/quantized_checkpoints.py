"""Turns a plain checkpoint, as tests/tiny_models.py makes them, into quantized ones as the hub has them, with their configuration.

Quantizes in numpy, by the formulas of the formats and not by Baton's code: one must not inherit the other's mistakes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
BLOCK = 128
_FP8_MAX = 448.0
_ACTIVATIONS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": True,
    "group_size": None,
    "num_bits": 8,
    "observer": None,
    "observer_kwargs": {},
    "strategy": "token",
    "symmetric": True,
    "type": "int",
}
_WEIGHTS = {**_ACTIVATIONS, "dynamic": False, "observer": "minmax", "strategy": "channel"}
_COMPRESSED_TENSORS = {
    "config_groups": {
        "group_0": {"input_activations": _ACTIVATIONS, "output_activations": None, "targets": ["Linear"], "weights": _WEIGHTS}
    },
    "format": "int-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def compressed_tensors(source: Path, out: Path) -> Path:
    """Int8 weights per channel, int8 activations per token, as llm-compressor writes them: `weight` I8, `weight_scale` [out, 1]."""

    def quantized(name: str, weight: torch.Tensor) -> Tensors:
        values, scales = _int8(weight)
        return {name: values, f"{name}_scale": scales}

    _copy(source, out, {"quantization_config": _COMPRESSED_TENSORS})
    save_file(_replaced(source, quantized), out / "model.safetensors", {"format": "pt"})
    return out


def modelslim(source: Path, out: Path) -> Path:
    """The same numbers as msmodelslim's W8A8_DYNAMIC: offsets of zero, two files of its own names, and a description. kv_b_proj stays."""

    def quantized(name: str, weight: torch.Tensor) -> Tensors:
        values, scales = _int8(weight)
        return {name: values, f"{name}_scale": scales, f"{name}_offset": torch.zeros_like(scales)}

    _copy(source, out, {})
    tensors = _replaced(source, quantized, keep=("kv_b_proj.weight",))
    kinds = {name: "W8A8_DYNAMIC" if _stem(name) in tensors and tensors[_stem(name)].dtype == torch.int8 else "FLOAT" for name in tensors}
    description = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0, **kinds}
    (out / "quant_model_description.json").write_text(json.dumps(description, indent=2))
    names, weight_map = sorted(tensors), dict[str, str]()
    for number in range(2):
        file = f"quant_model_weights-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[number::2], file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (out / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    return out


def fp8(source: Path, out: Path) -> Path:
    """e4m3 weights in blocks of 128 x 128 as DeepSeek-V3 has them: `weight` F8_E4M3, `weight_scale_inv` [ceil(out/128), ceil(in/128)]."""

    def quantized(name: str, weight: torch.Tensor) -> Tensors:
        values, scales = fp8_blocks(weight)
        return {name: values, f"{name}_scale_inv": scales}

    _copy(source, out, {"quantization_config": _FP8})
    save_file(_replaced(source, quantized), out / "model.safetensors", {"format": "pt"})
    return out


def fp8_turned_back(source: Path, out: Path) -> Path:
    """The plain float32 checkpoint that `fp8` stands for, for transformers to read."""
    _copy(source, out, {})
    save_file(
        _replaced(source, lambda name, weight: {name: from_fp8_blocks(*fp8_blocks(weight))}), out / "model.safetensors", {"format": "pt"}
    )
    return out


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> e4m3 of the same shape, float32 scales of its blocks; value * scale is about the weight."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    values, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            where = _block(row, column)
            scales[row, column] = weight[where].float().abs().max() / _FP8_MAX
            values[where] = (weight[where].float() / scales[row, column]).to(values.dtype)
    return values, scales


def from_fp8_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse, block by block, in float32."""
    weight = torch.empty(values.shape)
    for row in range(len(scales)):
        for column in range(scales.shape[1]):
            weight[_block(row, column)] = values[_block(row, column)].float() * scales[row, column]
    return weight


def _block(row: int, column: int) -> tuple[slice, slice]:
    return slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in] and float32 scales [out, 1]."""
    wide = weight.float().numpy()
    scales = np.abs(wide).max(axis=1, keepdims=True) / np.float32(127)
    return torch.from_numpy(np.rint(wide / scales).astype(np.int8)), torch.from_numpy(scales)


def _stem(name: str) -> str:
    return name.removesuffix("_scale").removesuffix("_offset")


def _replaced(source: Path, quantized: Callable[[str, torch.Tensor], Tensors], keep: tuple[str, ...] = ()) -> Tensors:
    """The tensors of a checkpoint of one file, the weights of its linear layers replaced: not embedding, head, router and norms."""
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        linear = tensor.ndim == 2 and name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith(keep)
        tensors |= quantized(name, tensor) if linear else {name: tensor}
    return tensors


def _copy(source: Path, out: Path, more: dict[str, Any]) -> None:
    """Everything but the tensors, with more in config.json."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **more}, indent=2))
