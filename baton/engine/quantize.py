"""From numbers to small integers and back. Pure tensor arithmetic in float32; knows no files and no layers."""

from __future__ import annotations

import torch

FP8_BLOCK = 128  # rows and columns that share a scale in DeepSeek-V3's fp8
_LEVELS = 127  # symmetric: -128 is not used


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, columns], any float dtype -> int8 [rows, columns] and float32 scales [rows, 1] with x ≈ int8 * scales.

    Symmetric: scale = max |row| / 127, values round to the nearest, ties to even. No element is further off than scale / 2. A row of
    zeros gets zeros and the smallest normal scale, and so do subnormal ones; a row that is not finite gets a scale that is not.
    """
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).div_(_LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scales).round_().to(torch.int8), scales


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 [rows, columns] and float32 scales [rows, 1] -> float32 [rows, columns]."""
    return values.float().mul_(scales)


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor, first_row: int, first_column: int) -> torch.Tensor:
    """The run of rows and columns that begins at (first_row, first_column) of an fp8 tensor [out, in] -> float32 of its shape.

    scales: [ceil(out / 128), ceil(in / 128)] float32, of the whole tensor, one per block of 128 x 128; those at the lower and right
    edge may be smaller (`weight_scale_inv` of https://huggingface.co/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md).
    """
    num_rows, num_columns = values.shape
    rows = torch.arange(first_row, first_row + num_rows) // FP8_BLOCK
    columns = torch.arange(first_column, first_column + num_columns) // FP8_BLOCK
    return values.float().mul_(scales[rows][:, columns])
