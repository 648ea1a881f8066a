"""A launch can be followed, with bars and without."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.display import LaunchDisplay
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
