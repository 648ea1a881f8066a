"""The figures mean what they say: shares, prefixes, perplexities and verdicts, on arrays whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.agreement import Agreement, Prefixes, Target, common_prefixes, perplexity, targets

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=8).map(lambda rows: np.array(rows, np.int64))


def test_agreement_counts_positions() -> None:
    one, other = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 0, 3], [4, 5, 0]])
    assert Agreement.of(one, other) == Agreement(4, 6)
    assert Agreement(3, 4).share == 0.75


def test_prefixes_end_at_the_first_difference_and_later_ones_do_not_count() -> None:
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = np.array([[1, 2, 3, 4], [0, 2, 3, 4], [1, 2, 0, 4], [1, 2, 0, 0]])
    assert common_prefixes(one, other) == [4, 0, 2, 2]
    assert Prefixes.of(one, other) == Prefixes(mean=2.0, median=2.0, whole=0.25)


@given(ROWS, st.randoms(use_true_random=False))
def test_a_prefix_is_what_a_reader_would_count(rows: np.ndarray, draw) -> None:
    other = np.array([[draw.choice((token, token, 9)) for token in row] for row in rows.tolist()])
    for length, one_row, other_row in zip(common_prefixes(rows, other), rows.tolist(), other.tolist(), strict=True):
        assert one_row[:length] == other_row[:length]
        assert length == len(one_row) or one_row[length] != other_row[length]
    assert common_prefixes(rows, other) == common_prefixes(other, rows)
    assert Prefixes.of(rows, rows) == Prefixes(5, 5.0, 1.0)
    assert Agreement.of(rows, other).equal >= sum(common_prefixes(rows, other))


def test_perplexity_of_even_odds_is_the_number_of_choices() -> None:
    assert perplexity(np.full((3, 7), math.log(1 / 40), np.float32)) == pytest.approx(40)
    assert perplexity(np.array([[0.0, math.log(1 / 4)]], np.float32)) == pytest.approx(2)


@pytest.mark.parametrize(
    ("value", "at_least", "holds"),
    [
        (0.98, True, True),
        (0.9799, True, False),
        (0.98, False, True),
        (0.9801, False, False),
        (math.nan, True, False),
        (math.nan, False, False),
    ],
)
def test_a_bound_is_included_and_nothing_is_not(value: float, at_least: bool, holds: bool) -> None:
    target = Target("figure", value, 0.98, at_least)
    assert target.holds is holds
    assert str(target).startswith("holds" if holds else "MISSED")


@pytest.mark.parametrize(
    ("equal", "ratio", "held"),
    [(98, 1.02, [True, True]), (97, 1.0, [False, True]), (100, 1.021, [True, False]), (100, 0.9, [True, True])],
)
def test_targets_are_the_two_of_the_issue(equal: int, ratio: float, held: list[bool]) -> None:
    assert [target.holds for target in targets(Agreement(equal, 100), ratio)] == held
