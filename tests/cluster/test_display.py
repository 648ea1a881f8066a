"""A launch can be followed, with bars and without."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.display import LaunchDisplay, time_line
from cluster.messages import Progress, Stage


@pytest.mark.parametrize("terminal", [True, False])
def test_a_launch_is_shown(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with LaunchDisplay(console) as display:
        display(Stage(stage="starting Ray"))
        display(Stage(stage="loading"))
        for done in (0, 5, 10):
            display(Progress(node="decode-0", rank=1, stage="loading weights", done_bytes=done, total_bytes=10))
        display(Progress(node="decode-0", rank=1, stage="ready"))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "decode-0/1" in said
    if not terminal:
        assert said.splitlines() == ["starting Ray ...", "loading ...", "  decode-0/1: loading weights", "  decode-0/1: ready"]


def test_it_is_said_where_the_time_of_a_launch_went() -> None:
    stages = [("starting Ray", 10.5), ("placing", 12.5), ("starting", 13.0), ("loading", 16.0), ("connecting", 16.5), ("proving", 16.7)]
    said = time_line(10.0, stages, 17.0)
    assert said == "ready after 7.0 s (command 0.5, Ray 2.0, ranks 3.5, weights 0.5, proof 0.5)"


_NAMES = st.sampled_from(["starting Ray", "placing", "starting", "loading", "connecting", "proving"])


@given(st.lists(st.tuples(_NAMES, st.integers(0, 50))), st.integers(0, 50))
def test_no_time_is_lost_or_counted_twice(stages: list[tuple[str, int]], began: int) -> None:
    entered = [(name, began + sum(seconds for _, seconds in stages[:i])) for i, (name, _) in enumerate(stages)]
    ready = began + sum(seconds for _, seconds in stages) + 1
    said = time_line(began, [*entered, ("proving", ready)], ready)
    assert sum(float(part.split()[-1].rstrip(")")) for part in said.partition("(")[2].split(",")) == ready - began
