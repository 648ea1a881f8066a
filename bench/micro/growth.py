"""What a decode step costs as work grows: with the batch, and with the context, beside the bytes and operations that it cannot avoid.

A step reads every weight and the keys and values of every row once, and multiplies every weight with every row. Memory beyond that must
not grow: whoever copied the cache in a step would show here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.micro.limits import Limits
from bench.micro.row import Row
from bench.models import made
from bench.solo import BLOCK_SIZE, Solo
from bench.timing import alternated

FOLDER = Path(__file__).resolve().parent.parent.parent / "build" / "bench-models"
MODEL = "qwen3-60m"
BATCHES, BATCH_CONTEXT = (1, 4, 16, 64, 128, 256), 128
CONTEXTS = (1_000, 10_000, 100_000)
_SELF = Path("/proc/self")
_RESET_PEAK = "5"  # of clear_refs, see proc(5)


@torch.inference_mode()
def rows(
    limits: Limits, model_dir: Path | None = None, batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS
) -> Iterator[Row]:
    """A decode step at every batch size, then of one row at every length of context. model_dir: default the bench model, made if needed."""
    folder = model_dir or made(MODEL, FOLDER)
    yield from _with_the_batch(limits, folder, batches)
    yield from _with_the_context(limits, folder, contexts)


def _with_the_batch(limits: Limits, folder: Path, batches: Sequence[int]) -> Iterator[Row]:
    solo = Solo(folder, "bfloat16", "none", max(batches), BATCH_CONTEXT)
    weights = _weights(folder)
    for batch, seconds in zip(batches, _seconds([_step(solo, batch, BATCH_CONTEXT) for batch in batches]), strict=True):
        read_bytes = 2 * weights + batch * _kv_bytes(solo, BATCH_CONTEXT)
        least_s = max(read_bytes / limits.memory_bytes_per_s, 2 * weights * batch / limits.bf16_flops)
        yield Row(f"a step of {batch} rows, context {BATCH_CONTEXT}", 1e3 * seconds, "ms", 1e3 * least_s, "bytes or operations")


def _with_the_context(limits: Limits, folder: Path, contexts: Sequence[int]) -> Iterator[Row]:
    solo = Solo(folder, "bfloat16", "none", 1, max(contexts))
    steps = [_step(solo, 1, context_len) for context_len in contexts]
    seconds = _seconds(steps)
    for context_len, took_s in zip(contexts, seconds, strict=True):
        more_bytes = _kv_bytes(solo, context_len) - _kv_bytes(solo, contexts[0])
        explained_s = seconds[0] + more_bytes / limits.memory_bytes_per_s
        yield Row(f"a step of one row, context {context_len:,}", 1e3 * took_s, "ms", 1e3 * explained_s, "the first and the bytes since")
    for context_len, step in zip(contexts, steps, strict=True):
        taken, kv_bytes = peak_bytes(step), _kv_bytes(solo, context_len)
        yield Row(f"memory taken in it, context {context_len:,}", taken / 1e6, "MB", kv_bytes / 1e6, "KV")


def _step(solo: Solo, batch: int, context_len: int) -> Callable[[int], object]:
    step = solo.step(np.zeros((batch, 1), np.int64), context_len - 1)
    return lambda _: solo.rank.forward(step)


def _seconds(steps: Sequence[Callable[[int], object]]) -> list[float]:
    return alternated(steps)


def _kv_bytes(solo: Solo, context_len: int) -> int:
    """Keys and values of one row."""
    return solo.rank.kv.shape.block_bytes * context_len // BLOCK_SIZE


def _weights(folder: Path) -> int:
    """Elements of a bfloat16 checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2


def peak_bytes(call: Callable[[int], object]) -> int:
    """How far this process's resident memory rises above what it was before, while the call runs. Linux only; else 0."""
    if not (_SELF / "clear_refs").exists():
        return 0
    call(0)  # pages of its results and of the allocator's are there afterwards
    (_SELF / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before = _status_bytes("VmRSS")
    call(0)
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = (_SELF / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
