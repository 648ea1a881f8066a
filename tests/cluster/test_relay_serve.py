"""`baton serve` for real: it serves, says where, refuses a second one, and however it ends, nothing is left."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from baton.client import connect
from baton.errors import BatonError, Unavailable
from tests.cluster.footprint import Footprint

pytestmark = [pytest.mark.relay, pytest.mark.timeout(240)]

SETTINGS = ("--kv-memory", "8MiB", "--max-model-len", "256")
GREEDY = {"max_tokens": 4, "temperature": 0.0}
WAIT_S = 120.0


class Serving:
    """A `baton serve` process with its output lines as they come."""

    def __init__(self, model: Path, tmp: Path, *arguments: str, http_port: int = 0) -> None:
        command = [sys.executable, "-m", "cluster.cli", "serve", "--model", str(model), "--http-port", str(http_port), "--grpc-port", "0"]
        self.process = subprocess.Popen([*command, *SETTINGS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.footprint = Footprint(tmp)
        self.out: list[str] = []
        self.err: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None and self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=pipe) for pipe in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Iterator[str], lines: list[str]) -> None:
        for line in pipe:
            lines.append(line.rstrip("\n"))
            self._lines.put(line)
        self._lines.put("")

    def until(self, beginning: str) -> str:
        """The first line that begins so."""
        while line := self._lines.get(timeout=WAIT_S):
            self.footprint.see(self.process.pid)
            if line.startswith(beginning):
                return line
        raise AssertionError(f"ended without {beginning!r}: {self.out} {self.err}")

    def end(self, signum: signal.Signals | None = None) -> int:
        """Send a signal, wait for the end; the exit code."""
        if signum is not None:
            self.process.send_signal(signum)
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join(10)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture
def serving(tiny_model: Path, tmp: Path) -> Iterator[Serving]:
    started = Serving(tiny_model, tmp)
    yield started
    if started.process.poll() is None:
        started.end(signal.SIGTERM)


def addresses(ready: str) -> tuple[str, str]:
    """HTTP and gRPC host:port of a ready line."""
    words = ready.split()
    return tuple(next(word for word in words if word.startswith(scheme)).removeprefix(scheme) for scheme in ("http://", "grpc://"))  # type: ignore[return-value]


def is_open(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def test_it_serves_until_ctrl_c_and_leaves_nothing(serving: Serving, tiny_model: Path, tmp: Path) -> None:
    shm_before = set(os.listdir("/dev/shm"))
    http, grpc = addresses(serving.until("ready: "))
    with urllib.request.urlopen(f"http://{http}/health", timeout=10) as health:
        assert health.status == 200
    with connect(grpc) as client:
        (answer,) = client.complete("def main():", max_tokens=8, ignore_eos=True)
        assert len(answer.token_ids) == 8
        assert [model.name for model in client.models()] == [str(tiny_model)]
    said = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "generate", "--address", grpc, "--max-tokens", "4", "--temperature", "0", "x ="],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said.stdout.strip()
    second = Serving(tiny_model, tmp, http_port=int(http.rsplit(":", 1)[1]))
    assert second.end() == 2
    assert http.rsplit(":", 1)[1] in second.err[-1] and "already in use" in second.err[-1]
    serving.footprint.see(serving.process.pid)
    assert serving.end(signal.SIGINT) == 0
    assert len(serving.out) == 1, serving.out
    serving.footprint.assert_gone()
    assert not is_open(http) and not is_open(grpc)
    assert set(os.listdir("/dev/shm")) <= shm_before


@pytest.mark.parametrize(
    ("stage", "signum"), [("starting Ray", signal.SIGINT), ("starting ...", signal.SIGTERM), ("loading", signal.SIGINT)]
)
def test_ending_it_while_it_loads_leaves_nothing(serving: Serving, stage: str, signum: signal.Signals) -> None:
    serving.until(stage)
    assert serving.end(signum) == 0
    assert not serving.out
    serving.footprint.assert_gone()


def test_a_frozen_rank_does_not_keep_it_from_ending(serving: Serving) -> None:
    _, grpc = addresses(serving.until("ready: "))
    with connect(grpc) as client:
        pids = [rank.pid for group in client.status().groups for rank in group.ranks]
    psutil.Process(pids[0]).suspend()
    assert serving.end(signal.SIGINT) == 0
    serving.footprint.assert_gone()


def test_killing_it_leaves_nothing(serving: Serving) -> None:
    serving.until("ready: ")
    serving.end(signal.SIGKILL)
    serving.footprint.assert_gone(40)


def test_a_dead_rank_comes_back_and_sigterm_lets_running_requests_finish(serving: Serving) -> None:
    """The rank is the only one that decodes: what is asked meanwhile waits for the next. After SIGTERM nothing more is taken."""
    _, grpc = addresses(serving.until("ready: "))
    with connect(grpc) as client, connect(grpc) as late:
        (expected,) = client.complete("x", **GREEDY)
        (decode,) = [group for group in client.status().groups if group.role == "decode"]
        psutil.Process(decode.ranks[0].pid).kill()
        assert serving.until("lost: decode-0/0").startswith(f"lost: decode-0/0 (pid {decode.ranks[0].pid}) ended: ")
        assert "decode-0/0: its process died" in serving.until("rebuilding decode-0 (")
        assert client.complete("x", **GREEDY)[0].token_ids == expected.token_ids
        serving.until("back: decode-0 after ")
        stream = client.generate("x", max_tokens=200, temperature=0.0, ignore_eos=True)
        num_tokens = len(next(stream).token_ids)
        serving.process.send_signal(signal.SIGTERM)
        serving.until("finishing what runs")
        with pytest.raises(Unavailable):
            while True:  # the router may hear of it a moment later
                late.complete("y", **GREEDY)
        assert num_tokens + sum(len(chunk.token_ids) for chunk in stream) == 200
    assert serving.end() == 0
    serving.footprint.assert_gone()


def test_without_rebuild_a_lost_node_stays_out_and_the_last_one_ends_it_all(tiny_model: Path, tmp: Path, tmp_path: Path) -> None:
    """A follower that dies while nothing runs: its leader still answers, and yet the router no longer counts on the node."""
    (tmp_path / "c.yaml").write_text("membership: {rebuild: false}\nprefill: {nodes: 2, tp: 2}\n")
    serving = Serving(tiny_model, tmp, "--config", str(tmp_path / "c.yaml"))
    try:
        _, grpc = addresses(serving.until("ready: "))
        with connect(grpc) as client:
            groups = client.status().groups
            (ranks,) = [group.ranks for group in groups if group.node == "prefill-0"]
            psutil.Process(ranks[1].pid).kill()
            serving.until("lost: prefill-0/1")
            while {group.node for group in client.status().groups} != {"prefill-1", "decode-0"}:
                time.sleep(0.1)
            *_, last = client.generate("after it", max_tokens=4, temperature=0.0)
            assert last.usage is not None
            (decode,) = [group for group in groups if group.role == "decode"]
            psutil.Process(decode.ranks[0].pid).kill()
    finally:
        assert serving.end() == 1
    assert "no decode node is left" in serving.err[-1]
    serving.footprint.assert_gone()


def test_a_second_signal_waits_for_nobody(tiny_model: Path, tmp: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("router: {drain_s: 600}\n")
    serving = Serving(tiny_model, tmp, "--config", str(tmp_path / "c.yaml"))
    _, grpc = addresses(serving.until("ready: "))
    with connect(grpc) as client:
        streams = [client.generate("x", max_tokens=240, temperature=0.0, ignore_eos=True, n=64) for _ in range(4)]
        assert all(next(stream).token_ids for stream in streams)
        serving.process.send_signal(signal.SIGTERM)
        serving.until("finishing what runs")
        assert serving.end(signal.SIGTERM) == 0
        with pytest.raises(BatonError):
            for stream in streams:
                list(stream)
    serving.footprint.assert_gone()


def test_weights_that_are_no_numbers_end_the_start_with_the_reason(tiny_model: Path, tmp: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    serving = Serving(broken, tmp)
    assert serving.end() == 1
    (said,) = [line for line in serving.err if line.startswith("baton: ")]
    assert "no pair of nodes passed its proof" in said and "logits are not finite" in said
    assert not serving.footprint.files()


def test_what_config_json_tells_is_refused_before_anything_starts(tiny_model: Path, tmp: Path) -> None:
    serving = Serving(tiny_model, tmp, "--max-model-len", "100000")
    assert serving.end() == 2
    assert "100000" in serving.err[-1]
    assert not serving.out and not serving.footprint.files()


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_the_rank_that_loads_it(tiny_model: Path, tmp: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    serving = Serving(broken, tmp)
    assert serving.end() == 2
    assert "prefill-0/0" in serving.err[-1] or "decode-0/0" in serving.err[-1]
    assert "model.norm.weight" in serving.err[-1]
    assert not serving.footprint.files()
