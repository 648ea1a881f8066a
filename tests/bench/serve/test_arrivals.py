"""Arrivals: in order, at the rate asked for, as bursty as asked for, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.arrivals import arrivals


@given(st.integers(1, 300), st.floats(0.1, 1000), st.floats(0.1, 50), st.integers(0, 2**31))
def test_they_are_in_order_and_last_as_long_as_the_rate_says(num, rate, burstiness, seed):
    times = arrivals(num, rate, burstiness, np.random.default_rng(seed))
    assert len(times) == num and times == sorted(times) and times[0] >= 0
    assert times[-1] == pytest.approx(num / rate)
    assert times == arrivals(num, rate, burstiness, np.random.default_rng(seed))


def test_all_at_once_and_a_metronome():
    rng = np.random.default_rng(0)
    assert arrivals(3, float("inf"), 1.0, rng) == [0.0, 0.0, 0.0]
    assert arrivals(4, 2.0, float("inf"), rng) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_gaps_of_a_poisson_process_vary_as_much_as_they_are_long():
    gaps = np.diff(arrivals(20_000, 1.0, 1.0, np.random.default_rng(1)))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    regular = np.diff(arrivals(20_000, 1.0, 25.0, np.random.default_rng(1)))
    assert regular.std() == pytest.approx(regular.mean() / 5, rel=0.05)
