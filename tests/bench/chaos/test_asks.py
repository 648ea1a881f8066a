"""What is asked is drawn from a seed, and is varied enough to be worth asking."""

import pytest

from baton.errors import ConfigError
from bench.chaos.asks import Door, draw

TEXT = [number % 97 for number in range(5000)]


def test_a_seed_gives_the_same_requests():
    assert draw(TEXT, 50, 5, (16, 64), 1) == draw(TEXT, 50, 5, (16, 64), 1)
    assert draw(TEXT, 50, 5, (16, 64), 1) != draw(TEXT, 50, 5, (16, 64), 2)
    assert draw(TEXT, 80, 5, (16, 64), 1).asks[:50] == draw(TEXT, 50, 5, (16, 64), 1).asks


def test_requests_are_varied_and_within_what_was_said():
    asked = draw(TEXT, 400, 8, (16, 64), 3)
    assert [ask.number for ask in asked.all] == list(range(408))
    assert {ask.door for ask in asked.asks} == set(Door)
    assert all(16 <= ask.max_tokens <= 64 for ask in asked.asks)
    for share in (
        sum(ask.temperature == 0 for ask in asked.asks),
        sum(ask.num_logprobs is not None for ask in asked.asks),
        sum(not ask.ignore_eos for ask in asked.asks),
    ):
        assert 40 < share < 360
    beginnings = [ask.prompt_ids[:16] for ask in asked.asks]
    assert max(map(beginnings.count, beginnings)) > 10, "prefixes are shared"
    assert all(len(ask.prompt_ids) >= 160 for ask in asked.burst)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="longer --text"):
        draw(TEXT[:100], 1, 0, (16, 64), 1)
