"""What is left of a cluster after deaths: when it can still serve, and what it lacks when it cannot."""

from __future__ import annotations

import os
import signal
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from baton.config import BatonConfig
from cluster.messages import ClusterInfo, RankInfo
from cluster.serve import Terminated, first_signal_interrupts, missing_part, ready_line, warn_unapplied


def info(prefill_nodes: int, decode_nodes: int) -> ClusterInfo:
    nodes = [("prefill", f"prefill-{i}") for i in range(prefill_nodes)] + [("decode", f"decode-{i}") for i in range(decode_nodes)]
    ranks = [RankInfo(role=role, node=node, rank=rank, pid=1, host="h", address="h:1") for role, node in nodes for rank in range(2)]  # type: ignore[arg-type]
    return ClusterInfo(model="m", http="127.0.0.1:1", grpc="127.0.0.1:2", router_pid=3, ranks=tuple(ranks))


@pytest.mark.parametrize(
    ("lost", "missing"),
    [
        (set(), None),
        ({"router"}, "router"),
        ({"prefill-0/1"}, "prefill node"),
        ({"decode-0/0"}, None),
        ({"decode-0/0", "decode-0/1"}, None),
        ({"decode-0/0", "decode-1/1"}, "decode node"),
    ],
)
def test_a_node_dies_with_any_of_its_ranks(lost: set[str], missing: str | None) -> None:
    assert missing_part(info(1, 2), lost) == missing


def test_the_ready_line_is_one_line_with_both_addresses() -> None:
    line = ready_line(info(1, 1))
    assert "\n" not in line
    assert "http://127.0.0.1:1" in line
    assert "grpc://127.0.0.1:2" in line


def test_what_the_model_asks_in_vain_is_said_before_the_start(tmp_path: Path) -> None:
    console = Console(record=True, file=StringIO())
    warn_unapplied(BatonConfig(model=str(tmp_path)), console)
    assert console.export_text() == ""
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.1}', encoding="utf-8")
    warn_unapplied(BatonConfig(model=str(tmp_path)), console)
    assert console.export_text() == "warning: generation_config.json asks for repetition_penalty 1.1, which is not applied\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_only_the_first_signal_interrupts(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(KeyboardInterrupt), first_signal_interrupts():
        try:
            os.kill(os.getpid(), signum)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # while things are being cleaned up
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_to_what_serves_is_gentle_and_the_next_signal_is_not(second: signal.Signals) -> None:
    with first_signal_interrupts(gently=lambda: True):
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            os.kill(os.getpid(), second)
        assert not isinstance(interrupted.value, Terminated)
        os.kill(os.getpid(), signal.SIGINT)  # while things are being cleaned up


def test_ctrl_c_is_never_gentle() -> None:
    with pytest.raises(KeyboardInterrupt) as interrupted, first_signal_interrupts(gently=lambda: True):
        os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(interrupted.value, Terminated)
