"""A cluster that keeps itself whole: what is killed or stopped is ended and built again, and requests are answered before and after.

One cluster of one prefill and two decode nodes for all tests of this file; each leaves it whole for the next.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from baton.client import connect
from baton.errors import NotFound
from cluster.cli import main
from cluster.messages import Back, ClusterInfo, Lost, News, Rebuilding, Retired
from cluster.offline import Engine
from ranks.facts import RankCounts

pytestmark = [pytest.mark.relay, pytest.mark.timeout(240)]

SETTINGS = {"kv_memory": "8MiB", "max_model_len": 256, "dtype": "float32", "decode.nodes": 2, "decode.tp": 2, "membership.beat_s": 0.5}
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
WAIT_S = 90.0


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(str(tiny_model), SETTINGS) as engine:
        yield engine


def until(engine: Engine, kind: type[News], **facts: object) -> list[News]:
    """All news up to the first of this kind with these facts."""
    heard: list[News] = []
    while (news := engine.wait_news(WAIT_S)) is not None:
        heard.append(news)
        if isinstance(news, kind) and facts.items() <= news.model_dump().items():
            return heard
    raise AssertionError(f"never heard {kind.__name__} {facts}: {heard}")


def pids(info: ClusterInfo, node: str) -> list[int]:
    return [rank.pid for rank in info.ranks if rank.node == node]


def answers(engine: Engine) -> tuple[int, ...]:
    (answer,) = engine.generate([[5, 6, 7, 8, 9]], GREEDY)
    return answer.token_ids


def whole(engine: Engine) -> ClusterInfo:
    """The processes, once all nodes are used again; nothing is held anywhere."""
    end_s = time.monotonic() + WAIT_S
    while len([group for group in engine.status()["groups"] if group["state"] == "ready"]) < 3 and time.monotonic() < end_s:
        time.sleep(0.1)
    counts: list[RankCounts] = engine.wait_idle()
    assert len(counts) == 5 and all(rank.idle() for rank in counts), counts
    return engine.processes()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_node_that_loses_a_rank_is_built_again_as_a_unit(engine: Engine, signum: signal.Signals, rank: int) -> None:
    expected, before = answers(engine), whole(engine)
    os.kill(pids(before, "decode-1")[rank], signum)
    assert answers(engine) == expected, "the other node serves meanwhile"
    heard = until(engine, Back, node="decode-1")
    assert isinstance(heard[0], Lost) and heard[0].name.startswith("decode-1/"), heard
    assert any(isinstance(news, Rebuilding) and news.node == "decode-1" for news in heard)
    after = whole(engine)
    assert not set(pids(before, "decode-1")) & set(pids(after, "decode-1")), "both ranks are new"
    assert not [pid for pid in pids(before, "decode-1") if psutil.pid_exists(pid)], "and the old ones are gone"
    assert pids(before, "decode-0") == pids(after, "decode-0"), "a restart of a peer harms nobody"
    assert answers(engine) == expected


def test_a_killed_router_comes_back_where_it_was_and_knows_every_node(engine: Engine) -> None:
    expected, before = answers(engine), whole(engine)
    os.kill(before.router_pid, signal.SIGKILL)
    until(engine, Back, node="router")
    after = whole(engine)
    assert (after.http, after.grpc, after.ranks) == (before.http, before.grpc, before.ranks)
    assert after.router_pid != before.router_pid
    assert answers(engine) == expected
    stages = {report["node"]: report["stage"] for report in engine.status()["nodes"]}
    assert stages == {"prefill-0": "serving", "decode-0": "serving", "decode-1": "serving"}


def test_a_stopped_router_is_as_good_as_dead(engine: Engine) -> None:
    before = whole(engine)
    os.kill(before.router_pid, signal.SIGSTOP)
    heard = until(engine, Back, node="router")
    assert isinstance(heard[0], Lost) and "answered nothing" in heard[0].reason
    assert not psutil.pid_exists(before.router_pid)
    assert answers(engine)


def test_a_drained_node_gives_its_slots_back_and_is_built_again_when_asked(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    before = whole(engine)
    address = ["--address", before.grpc]
    assert main(["drain", "decode-0", *address]) == 0
    said = capsys.readouterr().out
    assert "decode-0 is idle after" in said and "its 2 processes have ended and its slots are given back" in said
    until(engine, Retired, node="decode-0", num_processes=2)
    assert not [pid for pid in pids(before, "decode-0") if psutil.pid_exists(pid)]
    assert not pids(engine.processes(), "decode-0") and len(engine.counts()) == 3
    assert answers(engine)
    assert main(["restore", "decode-0", *address]) == 0
    assert "decode-0 serves again after" in capsys.readouterr().out
    until(engine, Back, node="decode-0")
    assert len(pids(whole(engine), "decode-0")) == 2


def test_a_node_may_be_drained_and_kept(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    before = whole(engine)
    address = ["--address", before.grpc]
    assert main(["drain", "decode-0", "--keep", *address]) == 0
    assert "its 2 processes stay" in capsys.readouterr().out
    with connect(before.grpc) as client:
        for _ in range(3):
            assert client.complete([1, 2, 3], **GREEDY)[0].served_by[-1] == "decode-1/0"
        with pytest.raises(NotFound, match="decode-0, decode-1, prefill-0"):
            client.drain("decode-7", 0.0)
    assert main(["restore", "decode-0", *address]) == 0
    assert whole(engine) == before


def test_with_no_decode_node_left_a_request_waits_for_the_one_that_is_built(engine: Engine) -> None:
    expected, before = answers(engine), whole(engine)
    for node in ("decode-0", "decode-1"):
        os.kill(pids(before, node)[0], signal.SIGKILL)
    assert answers(engine) == expected
    assert len(whole(engine).ranks) == 5
