"""Matrix products: packed ones beside torch's, oneDNN's and what the machine gives; and all of a model's, without anything between.

Weights are many copies, taken in turn, so that they come from memory as those of a model do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from baton.engine.batch import Batch
from baton.engine.devices import Matrix, native, open_device
from baton.engine.devices.cpu import CpuDevice
from bench.micro.limits import Limits
from bench.micro.row import Row
from bench.models import made
from bench.solo import Solo
from bench.timing import Call, alternated

FOLDER = Path(__file__).resolve().parent.parent.parent / "build" / "bench-models"
MODELS = "qwen3-60m", "qwen3moe-200m"
SHAPES = ((1024, 512), (512, 512), (3072, 512), (512, 1536), (32000, 512))  # [out, in] of the bench model
ROWS = (1, 4, 16, 64, 128, 512)
STEPS = ((1, 1), (16, 1), (32, 1), (128, 1), (1, 512), (4, 512))  # sequences, tokens of each: decode steps, then prefill steps
_CACHES_BYTES, _MAX_COPIES = 1 << 26, 256
Product = Callable[[], torch.Tensor]
Multiply = Callable[[torch.Tensor, int], torch.Tensor]


@torch.inference_mode()
def rows(
    limits: Limits,
    model_dirs: Sequence[Path] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    num_rows: Sequence[int] = ROWS,
    steps: Sequence[tuple[int, int]] = STEPS,
) -> Iterator[Row]:
    """Shape by shape in bfloat16 and float32, then steps of models. model_dirs: default the bench models, made if needed."""
    for dtype in (torch.bfloat16, torch.float32):
        for out, width in shapes:
            yield from _of_shape(limits, out, width, dtype, num_rows)
    for model_dir in model_dirs if model_dirs is not None else [made(name, FOLDER) for name in MODELS]:
        yield from _of_model(model_dir, steps)


def gemm_only(model_dir: Path, dtype: str, steps: Sequence[tuple[int, int]]) -> list[float]:
    """Seconds that a model's matrix products take (linear maps, experts, head), per step of (sequences, tokens of each) from position 0.

    Those of a forward are recorded and then done again, in their order and with their weights, and nothing between them. With the
    threads that torch has now. Raises ConfigError as loading does.
    """
    return alternated([again for _, again in _taken_apart(model_dir, dtype, steps)])


class Recording(CpuDevice):
    """The cpu device, which notes the matrix products that it is asked for."""

    def __init__(self) -> None:
        super().__init__(native.library())
        self._plain = CpuDevice(native.library())
        self._noted: list[Product] | None = None

    def of(self, work: Call) -> list[Product]:
        """The products of this work, to be done again."""
        noted = self._noted = []
        work(0)
        self._noted = None
        return noted

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._done(partial(self._plain.linear, x, weight, bias))

    def gated_linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._done(partial(self._plain.gated_linear, x, weight, bias))

    def experts(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Matrix, down: Matrix) -> torch.Tensor:
        return self._done(partial(self._plain.experts, x, weights, ids, gate_up, down))

    def _done(self, product: Product) -> torch.Tensor:
        if self._noted is not None:
            self._noted.append(product)
        return product()


def _again(products: Sequence[Product], _: int) -> None:
    for product in products:
        product()


def _forward(solo: Solo, batch: Batch, _: int) -> None:
    solo.rank.forward(batch)


def _taken_apart(model_dir: Path, dtype: str, steps: Sequence[tuple[int, int]]) -> list[tuple[Call, Call]]:
    """Per step (sequences, tokens of each): the whole of it, and its matrix products alone."""
    recording, draw = Recording(), np.random.default_rng(0)
    solo = Solo(model_dir, dtype, "none", max(sequences for sequences, _ in steps), max(tokens for _, tokens in steps), recording)
    wholes = [partial(_forward, solo, solo.step(draw.integers(0, solo.spec.vocab, step), 0)) for step in steps]
    return [(whole, partial(_again, recording.of(whole))) for whole in wholes]


def _of_shape(limits: Limits, out: int, width: int, dtype: torch.dtype, num_rows: Sequence[int]) -> Iterator[Row]:
    size, peak = out * width * dtype.itemsize, limits.bf16_flops if dtype == torch.bfloat16 else limits.fp32_flops
    weights = [torch.randn(out, width).to(dtype) for _ in range(min(_CACHES_BYTES // size, _MAX_COPIES) + 1)]
    ways = [_packed(weights), _plain(weights), *([_onednn(weights)] if dtype == torch.bfloat16 else [])]
    for rows_ in num_rows:
        x = torch.randn(rows_, width).to(dtype)
        packed_s, *others_s = alternated([partial(way, x) for way in ways])
        least_s = max(size / limits.memory_bytes_per_s, 2 * rows_ * out * width / peak)
        what = f"[{out}, {width}] {str(dtype).removeprefix('torch.')}, {rows_} rows"
        for seconds, name in zip((least_s, *others_s), ("bytes or operations", "F.linear", "oneDNN packed"), strict=False):
            yield Row(what, 1e6 * packed_s, "us", 1e6 * seconds, name)


def _packed(weights: Sequence[torch.Tensor]) -> Multiply:
    device = open_device("cpu")
    matrices = [device.prepare(Matrix(values)) for values in weights]
    return lambda x, number: device.linear(x, matrices[number % len(matrices)])


def _plain(weights: Sequence[torch.Tensor]) -> Multiply:
    return lambda x, number: functional.linear(x, weights[number % len(weights)])


def _onednn(weights: Sequence[torch.Tensor]) -> Multiply:
    packed = [torch.ops.mkldnn._reorder_linear_weight(values) for values in weights]
    return lambda x, number: torch.ops.mkldnn._linear_pointwise(x, packed[number % len(packed)], None, "none", [], "")


def _of_model(model_dir: Path, steps: Sequence[tuple[int, int]]) -> Iterator[Row]:
    for (sequences, tokens), calls in zip(steps, _taken_apart(model_dir, "bfloat16", steps), strict=True):
        whole_s, products_s = alternated(calls)
        yield Row(f"{model_dir.name}, {sequences} x {tokens} tokens: matrix products", 1e3 * products_s, "ms", 1e3 * whole_s, "whole step")
