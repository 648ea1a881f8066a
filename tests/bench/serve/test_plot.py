"""The picture: valid SVG, every point inside its panel, round ticks."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.answers import Answer
from bench.serve.asks import Ask
from bench.serve.plot import picture, shares, ticks


def made(gaps: list[float]) -> Answer:
    answer = Answer(Ask("x", 1, 1), 100.0, 100.0, 100.0)
    for gap in gaps:
        answer.token_s.append((answer.token_s or [100.0])[-1] + gap)
    answer.end((answer.token_s or [100.0])[-1])
    return answer


@given(st.lists(st.lists(st.floats(1e-6, 5), max_size=6), max_size=8))
def test_any_run_can_be_drawn(requests):
    text = picture([made(gaps) for gaps in requests], "a <title> & more")
    root = ElementTree.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    lines = re.findall(r'points="([^"]*)"', text)
    assert len(lines) == 4
    for x, y in (map(float, point.split(",")) for line in lines for point in line.split()):
        assert 0 <= x <= width and 0 <= y <= height


@given(st.lists(st.floats(0, 100), max_size=1000))
def test_shares_rise_to_one(seconds):
    found = shares(seconds)
    assert found == sorted(found) and len(found) <= 400
    assert not seconds or found[-1] == (pytest.approx(max(seconds) * 1e3), 1.0)


@given(st.floats(1e-6, 1e9))
def test_ticks_are_a_handful(most):
    found = ticks(most)
    assert 2 <= len(found) <= 6 and found[0] == 0 and found[-1] <= most * (1 + 1e-9)
