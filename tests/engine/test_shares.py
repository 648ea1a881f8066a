"""The tokens of a step: all are used, short prompts first, equals by age, and the oldest is sure of half."""

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.shares import Shares


@dataclass
class Prompt:
    arrival: int
    num_left: int


PROMPTS = st.lists(st.integers(1, 40), max_size=8).map(lambda lens: [Prompt(i, num_left) for i, num_left in enumerate(lens)])


def shared(num_tokens, prompts):
    """What each prompt gets, by arrival."""
    shares = Shares.of(num_tokens, prompts)
    shares.serve(math.inf)
    given = {prompt.arrival: count for prompt, count in shares.given}
    assert len(given) == len(shares.given), "one turn each"
    return given


@given(st.integers(1, 64), PROMPTS)
def test_no_token_is_left_over_while_a_prompt_needs_it(num_tokens, prompts):
    given = shared(num_tokens, prompts)
    assert sum(given.values()) == min(num_tokens, sum(prompt.num_left for prompt in prompts))
    assert all(1 <= count <= prompts[arrival].num_left for arrival, count in given.items())


@given(st.integers(1, 64), PROMPTS.filter(len))
def test_the_oldest_is_sure_of_half(num_tokens, prompts):
    assert shared(num_tokens, prompts).get(0, 0) >= min(prompts[0].num_left, num_tokens // 2)


@given(st.integers(1, 64), PROMPTS.filter(len), st.data())
def test_nobody_waits_for_a_longer_one(num_tokens, prompts, data):
    """Whoever fits beside the shorter ones and the oldest's half is done in this step, whatever else is under way."""
    mine = data.draw(st.sampled_from(prompts))
    before = [prompt for prompt in prompts if (prompt.num_left, prompt.arrival) <= (mine.num_left, mine.arrival)]
    if sum(prompt.num_left for prompt in before) <= num_tokens - num_tokens // 2:
        assert shared(num_tokens, prompts)[mine.arrival] == mine.num_left


@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 8))
def test_equally_long_ones_are_computed_one_after_the_other(num_tokens, num_left, count):
    given = shared(num_tokens, [Prompt(i, num_left) for i in range(count)])
    assert list(given) == list(range(len(given)))
    assert all(part == num_left for part in list(given.values())[:-1])


def test_a_new_prompt_has_its_turn_between_those_under_way():
    long, short = Prompt(0, 100), Prompt(1, 10)
    shares = Shares.of(40, [long, short])
    shares.serve(20)
    assert (shares.given, shares.room()) == ([(short, 10)], 10)
    new = Prompt(2, 30)
    shares.give(new)
    shares.serve(math.inf)
    assert shares.given == [(short, 10), (new, 10), (long, 20)]
