"""How fast the engine computes with int8 weights beside bf16 ones, and how near it comes to what the machine can do.

The roofline (Williams, Waterman and Patterson, https://doi.org/10.1145/1498765.1498785): a linear map takes at least the time to read
its weights at the memory's rate, and at least the time of its operations at the best rate of its kind seen in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from baton.engine.batch import Batch
from baton.engine.devices import Matrix
from baton.engine.devices.cpu_linear import linear
from baton.engine.spec import ModelSpec
from bench.solo import Advance, Solo
from bench.timing import alternated, memory_bytes_per_s

ROWS = (1, 16, 128, 512)
BATCHES = (1, 16, 64)
# Without copies, weights that fit would be read from a cache, which they are not where a whole model passes between two uses.
_BEYOND_CACHES_BYTES = 1 << 27


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear map. cached: as part of a model so small that its weights stay in the caches."""

    name: str
    out: int
    into: int
    cached: bool = False


PRODUCTION = (
    Shape("square", 4096, 4096),
    Shape("Qwen3-8B gate, up", 24576, 4096),
    Shape("Qwen3-8B down", 4096, 12288),
    Shape("Qwen3-30B-A3B gate, up", 1536, 2048),
    Shape("Qwen3-30B-A3B down", 2048, 768),
)


@dataclass(frozen=True, slots=True)
class LinearTime:
    """One linear map on a number of rows, in both kinds."""

    shape: Shape
    num_rows: int
    bf16_s: float
    int8_s: float

    @property
    def speedup(self) -> float:
        """How many times faster int8 is."""
        return self.bf16_s / self.int8_s

    @property
    def num_operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.num_rows * self.shape.out * self.shape.into

    @property
    def num_weights(self) -> int:
        """Elements of the matrix."""
        return self.shape.out * self.shape.into


@dataclass(frozen=True, slots=True)
class Limits:
    """What nothing on this machine exceeded in this run. bf16_rate, int8_rate: operations per second."""

    memory_bytes_per_s: float
    bf16_rate: float
    int8_rate: float

    @classmethod
    def seen(cls, memory_bytes_per_s: float, times: Sequence[LinearTime]) -> Limits:
        """The best rates among these."""
        reads = [max(2 * t.num_weights / t.bf16_s, t.num_weights / t.int8_s) for t in times if not t.shape.cached]
        return cls(
            max(memory_bytes_per_s, *reads),
            max(t.num_operations / t.bf16_s for t in times),
            max(t.num_operations / t.int8_s for t in times),
        )

    def bf16_share(self, time: LinearTime) -> float:
        """Of the roofline, 0 to 1."""
        return self._least_s(time, 2, self.bf16_rate) / time.bf16_s

    def int8_share(self, time: LinearTime) -> float:
        """Of the roofline, 0 to 1."""
        return self._least_s(time, 1, self.int8_rate) / time.int8_s

    def _least_s(self, time: LinearTime, weight_bytes: int, rate: float) -> float:
        read_s = 0.0 if time.shape.cached else time.num_weights * weight_bytes / self.memory_bytes_per_s
        return max(read_s, time.num_operations / rate)


@dataclass(frozen=True, slots=True)
class StepTime:
    """One decode step of the whole model at a batch size, in both kinds."""

    batch: int
    context_len: int
    bf16_s: float
    w8a8_s: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Everything measured."""

    limits: Limits
    linears: tuple[LinearTime, ...]
    steps: tuple[StepTime, ...]


def shapes_of(spec: ModelSpec) -> tuple[Shape, ...]:
    """The feed-forward and, for grouped-query attention, the attention maps as the engine fuses them."""
    width = spec.moe.intermediate if spec.moe else spec.intermediate
    shapes = [Shape("gate, up", 2 * width, spec.hidden, cached=True), Shape("down", spec.hidden, width, cached=True)]
    if spec.mla is None:
        queries = spec.heads * spec.head_dim
        shapes.append(Shape("query, key, value", queries + 2 * spec.kv_heads * spec.head_dim, spec.hidden, cached=True))
        shapes.append(Shape("attention output", spec.hidden, queries, cached=True))
    return tuple(shapes)


def linear_times(shape: Shape, advance: Advance) -> Iterator[LinearTime]:
    """One map at every number of ROWS. advance(1) after each."""
    bf16, int8 = _matrices(shape)
    for num_rows in ROWS:
        x = torch.randn(num_rows, shape.into, dtype=torch.bfloat16)
        bf16_s, int8_s = alternated([partial(_multiply, x, kind) for kind in (bf16, int8)])
        yield LinearTime(shape, num_rows, bf16_s, int8_s)
        advance(1)


def step_times(bf16: Solo, w8a8: Solo, context_len: int, advance: Advance) -> Iterator[StepTime]:
    """Decode steps at every size of BATCHES, each row with context_len tokens. advance(1) after each."""
    for batch in BATCHES:
        step = bf16.step(np.zeros((batch, 1), np.int64), context_len - 1)
        bf16_s, w8a8_s = alternated([partial(_forward, solo, step) for solo in (bf16, w8a8)])
        yield StepTime(batch, context_len, bf16_s, w8a8_s)
        advance(1)


@torch.inference_mode()
def measured(bf16: Solo, w8a8: Solo, context_len: int, advance: Advance) -> Speed:
    """Everything. advance(1) after each of num_measurements parts."""
    # Once between any two shapes: on a machine shared with others the best of a moment is not what it can do.
    shapes, bytes_per_s, linears = (*shapes_of(bf16.spec), *PRODUCTION), 0.0, list[LinearTime]()
    for shape in shapes:
        bytes_per_s = max(bytes_per_s, memory_bytes_per_s())
        linears += linear_times(shape, advance)
    return Speed(Limits.seen(bytes_per_s, linears), tuple(linears), tuple(step_times(bf16, w8a8, context_len, advance)))


def num_measurements(spec: ModelSpec) -> int:
    """How often `measured` tells of its progress."""
    return len(ROWS) * len((*shapes_of(spec), *PRODUCTION)) + len(BATCHES)


def _forward(solo: Solo, step: Batch, _: int) -> None:
    solo.rank.forward(step)


def _matrices(shape: Shape) -> tuple[list[Matrix], list[Matrix]]:
    """Copies in bf16 and in int8: enough that a kind's copies together exceed the caches."""
    size = shape.out, shape.into
    num_bytes = shape.out * shape.into
    bf16 = [Matrix(torch.randn(size).bfloat16()) for _ in range(_copies(shape, 2 * num_bytes))]
    int8 = [Matrix(torch.randint(-127, 128, size, dtype=torch.int8), torch.rand(shape.out) / 127) for _ in range(_copies(shape, num_bytes))]
    return bf16, int8


def _copies(shape: Shape, num_bytes: int) -> int:
    return 1 if shape.cached else -(-_BEYOND_CACHES_BYTES // num_bytes)


def _multiply(x: torch.Tensor, matrices: Sequence[Matrix], number: int) -> None:
    linear(x, matrices[number % len(matrices)])
