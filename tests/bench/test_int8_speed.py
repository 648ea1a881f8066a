"""Shares of the roofline on figures whose answer is known, the shapes of a model, and that every measurement is taken. No times."""

from pathlib import Path

import pytest
import torch

from baton.engine.config_json import load_spec
from bench.int8_speed import ROWS, Limits, LinearTime, Shape, linear_times, shapes_of
from bench.timing import alternated

GIGA = 1e9


def test_few_rows_are_bound_by_memory_and_many_by_arithmetic() -> None:
    limits = Limits(memory_bytes_per_s=10 * GIGA, bf16_rate=100 * GIGA, int8_rate=200 * GIGA)
    shape = Shape("square", 1000, 1000)
    one = LinearTime(shape, 1, bf16_s=4e-4, int8_s=4e-4)  # bf16 reads 2 MB, int8 1 MB
    assert (limits.bf16_share(one), limits.int8_share(one)) == (pytest.approx(0.5), pytest.approx(0.25))
    many = LinearTime(shape, 100, bf16_s=4e-3, int8_s=4e-3)  # 0.2 GFLOP
    assert (limits.bf16_share(many), limits.int8_share(many)) == (pytest.approx(0.5), pytest.approx(0.25))


def test_weights_in_the_caches_are_not_bound_by_memory() -> None:
    limits = Limits(memory_bytes_per_s=1.0, bf16_rate=100 * GIGA, int8_rate=200 * GIGA)
    time = LinearTime(Shape("small", 100, 100, cached=True), 1, bf16_s=2e-7, int8_s=1e-7)
    assert (limits.bf16_share(time), limits.int8_share(time), time.speedup) == (pytest.approx(1), pytest.approx(1), pytest.approx(2))


def test_limits_are_the_best_of_the_run() -> None:
    square = Shape("square", 1000, 1000)
    times = [LinearTime(square, 1, 1e-4, 1e-3), LinearTime(square, 100, 1e-3, 1e-2)]
    assert Limits.seen(5 * GIGA, times) == Limits(pytest.approx(20 * GIGA), pytest.approx(200 * GIGA), pytest.approx(20 * GIGA))
    assert Limits.seen(30 * GIGA, times).memory_bytes_per_s == 30 * GIGA


def test_shapes_are_those_the_engine_fuses(tiny_moe: Path) -> None:
    shapes = {shape.name: (shape.out, shape.into) for shape in shapes_of(load_spec(tiny_moe))}
    attention = {"query, key, value": (4 * 16 + 2 * 2 * 16, 64), "attention output": (64, 4 * 16)}
    assert shapes == {"gate, up": (2 * 32, 64), "down": (64, 32), **attention}


def test_every_number_of_rows_is_measured() -> None:
    done: list[int] = []
    with torch.inference_mode():
        times = list(linear_times(Shape("tiny", 32, 64, cached=True), done.append))
    assert [time.num_rows for time in times] == list(ROWS)
    assert len(done) == len(ROWS)
    assert all(time.bf16_s > 0 and time.int8_s > 0 for time in times)


def test_calls_take_turns() -> None:
    """And are told a running number, from 0 in every turn."""
    seen: list[tuple[str, int]] = []
    slow = torch.zeros(1 << 22)

    def call(name: str, number: int) -> None:
        slow.add_(1)
        seen.append((name, number))

    first, second = alternated([lambda number: call("a", number), lambda number: call("b", number)])
    assert first > 0 and second > 0
    turns = [name for name, number in seen if number == 0]
    assert turns[-10:] == ["a", "b"] * 5
