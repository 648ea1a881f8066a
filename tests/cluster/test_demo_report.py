"""The demo's checks hold for a good run and fail, each by itself, for a bad one."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from baton.request import Chunk, FinishReason, Usage
from cluster.demo_report import Story, checks, print_report
from cluster.messages import ClusterInfo, RankInfo
from ranks.facts import RankCounts

INFO = ClusterInfo(
    model="demo",
    http="127.0.0.1:1",
    grpc="127.0.0.1:2",
    router_pid=10,
    ranks=(
        RankInfo(role="prefill", node="prefill-0", rank=0, pid=11, host="h", address="h:1"),
        RankInfo(role="decode", node="decode-0", rank=0, pid=12, host="h", address="h:2"),
    ),
)
IDLE = RankCounts("prefill-0", 0, 11, True, 9, 5, 4, 0, 0, 0, 0, 0, 7, True, 1.5)
PULLS = {"pulls": 1, "blocks_pulled": 2, "blocks_matched": 0, "bytes_pulled": 2**20}


def status(**pulls: object) -> dict[str, Any]:
    return {"groups": [{"name": "prefill-0", "role": "prefill"}, {"name": "decode-0/0", "role": "decode", "pulls": {**PULLS, **pulls}}]}


def story(**changes: Any) -> Story:
    told = Story("def f():\n  pass")
    told.add(Chunk("r", 0, text=" a", token_ids=(1,), served_by=("prefill-0",)), 0.5)
    told.add(Chunk("r", 0, text=" b", token_ids=(2, 3), served_by=("prefill-0", "decode-0/0"), finish_reason=FinishReason.STOP), 1.5)
    told.add(Chunk("r", 0, usage=Usage(5, 3, 0)), 1.6)
    return replace(told, **changes)


def failures(stories: list[Story], state: dict[str, Any], counts: list[RankCounts]) -> list[int]:
    return [number for number, check in enumerate(checks(INFO, stories, state, counts)) if not check.holds]


def test_a_story_counts_what_it_hears() -> None:
    told = story()
    assert (told.text, told.num_tokens, told.first_s, told.last_s) == (" a b", 3, 0.5, 1.5)
    assert told.tokens_per_s() == pytest.approx(2.0)
    assert Story("p").tokens_per_s() == 0


def test_a_good_run_passes_every_check() -> None:
    assert failures([story()], status(), [IDLE, IDLE]) == []


@pytest.mark.parametrize(
    ("stories", "state", "counts", "failed"),
    [
        ([story(finish_reason=None)], status(), [IDLE, IDLE], [0]),
        ([story(usage=Usage(5, 2, 0))], status(), [IDLE, IDLE], [1]),
        ([story(served_by=("decode-0/0",))], status(), [IDLE, IDLE], [2]),
        ([story(served_by=("prefill-0", "decode-0/1"))], status(), [IDLE, IDLE], [3]),
        ([story()], status(blocks_pulled=0), [IDLE, IDLE], [4]),
        ([story()], status(), [IDLE, replace(IDLE, held=1, free=4)], [5]),
        ([story()], status(), [IDLE, replace(IDLE, free=4)], [5]),
        ([story()], status(), [IDLE], [5]),
    ],
)
def test_each_flaw_fails_its_check(stories: list[Story], state: dict[str, Any], counts: list[RankCounts], failed: list[int]) -> None:
    assert failures(stories, state, counts) == failed


def test_the_report_fits_80_columns_and_has_the_facts() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_report(console, INFO, [story()], status(transport="shm"), [IDLE, replace(IDLE, leader=False)])
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    for fact in ("500 ms", "prefill-0 → decode-0/0", "5 + 4 + 0 + 0 = 9", "as its leader says", "over shm", "2 blocks and 1.00 MiB"):
        assert fact in said
    assert all(len(line.rstrip()) <= 80 for line in said.splitlines())
