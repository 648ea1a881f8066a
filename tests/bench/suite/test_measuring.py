"""What the suite computes is right: gaps, rates, FLOPs of a token; and servers start, freeze, go on and leave nothing behind."""

from __future__ import annotations

import signal
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InternalError, Unavailable
from bench.suite.flops import bound, multiplied
from bench.suite.gaps import common_window, gaps_within, rate_of, summary
from bench.suite.servers import Command, Server, free_port
from tests.tiny_models import make_tiny


def test_gaps_count_while_all_streams_run():
    streams = [[0.1 * i for i in range(20)], [0.5 + 0.1 * i for i in range(30)]]
    start_s, end_s = common_window(streams)
    assert (start_s, end_s) == (pytest.approx(1.3), pytest.approx(1.9))
    gaps = gaps_within(streams, start_s - 1e-6, end_s + 1e-6)
    assert gaps == pytest.approx([0.1] * 12)
    assert summary([*gaps, 0.9])["max_itl_ms"] == pytest.approx(900)


@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=15).map(sorted), min_size=1, max_size=4), st.floats(0, 9), st.floats(0, 9))
def test_gaps_within_are_those_that_begin_and_end_there(streams, start_s, end_s):
    slow = [b - a for times in streams for a, b in pairwise(times) if a >= start_s and b <= end_s]
    assert gaps_within(streams, start_s, end_s) == slow


def test_a_rate_needs_a_few_ends():
    assert rate_of([3.0, 1.0, 2.0]) == 1.0
    with pytest.raises(InternalError, match="too few"):
        rate_of([1.0, 2.0])
    with pytest.raises(InternalError, match="no moment"):
        summary([])


def test_the_flops_of_a_token_are_those_of_its_matrices():
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "model.layers.0.self_attn.q_proj.weight": (16, 8),
        "model.layers.0.mlp.experts.0.up_proj.weight": (4, 8),
        "model.layers.0.mlp.experts.1.up_proj.weight": (4, 8),
        "model.norm.weight": (8,),
    }
    assert multiplied(shapes, 0.5) == (16 * 8 + 4 * 8, 800)
    assert multiplied({**shapes, "lm_head.weight": (100, 8)}, 0.5) == (16 * 8 + 4 * 8, 800)


def test_the_bound_of_a_real_checkpoint(tmp_path):
    found = bound(make_tiny("qwen3_moe", tmp_path / "m", dtype="bfloat16"), 50, 50)
    assert found.mflop_per_output > 0 and found.peak_gflops > 0
    assert found.tokens_per_s == pytest.approx(found.peak_gflops * 1e3 / found.mflop_per_output)


def web_server(folder: Path) -> Command:
    (folder / "health").write_text("ok")
    port = free_port()
    # A child beside the server, as real ones have.
    program = f"""if True:
        import functools, http.server, subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        files = functools.partial(http.server.SimpleHTTPRequestHandler, directory={str(folder)!r})
        http.server.ThreadingHTTPServer(("127.0.0.1", {port}), files).serve_forever()
    """
    return Command("web", [sys.executable, "-c", program], port, signal.SIGINT, {})


def test_a_server_starts_freezes_goes_on_and_leaves_nothing(tmp_path):
    with Server(web_server(tmp_path), tmp_path) as server:
        assert server.ready_s > 0
        family = [
            process for process in psutil.process_iter(["cmdline"]) if str(server.command.port) in " ".join(process.info["cmdline"] or [])
        ]
        assert len(family) == 1
        family += family[0].children(recursive=True)
        assert len(family) == 2
        server.freeze()
        assert {process.status() for process in family} == {psutil.STATUS_STOPPED}
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{server.command.url}/health", timeout=0.3)
        server.thaw()
        assert urllib.request.urlopen(f"{server.command.url}/health", timeout=5).status == 200
        server.freeze()  # and it can be ended while frozen
    assert not any(process.is_running() for process in family)


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path):
    command = Command("bad", [sys.executable, "-c", "print('no such model')"], free_port(), signal.SIGINT, {})
    with pytest.raises(Unavailable, match="no such model"):
        Server(command, tmp_path).__enter__()
