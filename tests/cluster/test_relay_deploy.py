"""`baton up`, `status` and `down` on a Ray cluster that was there before, and stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from baton.client import connect
from cluster.local import environment, make_home, remove_home
from cluster.offline import Engine
from tests.cluster.test_local import start

pytestmark = [pytest.mark.relay, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class ExistingRay:
    environ: dict[str, str]
    process: subprocess.Popen[str]

    def baton(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def existing_ray(tmp: Path) -> Iterator[ExistingRay]:
    home = make_home()
    process = start(home)
    assert process.stdout is not None
    *_, address = process.stdout.readline().split()
    yield ExistingRay({**environment(home, dict(os.environ)), "RAY_ADDRESS": address}, process)
    process.communicate(timeout=60)
    remove_home(home)


def config(tmp: Path, model: Path, more: str = "") -> str:
    path = tmp / "cluster.yaml"
    path.write_text(f"model: {model}\nkv_memory: 8MiB\nmax_model_len: 256\nrouter: {{http_port: 0, grpc_port: 0}}\n{more}")
    return str(path)


def test_a_cluster_outlives_up_and_ends_with_down(existing_ray: ExistingRay, tiny_model: Path, tmp: Path) -> None:
    assert existing_ray.baton("status").returncode == 1
    up = existing_ray.baton("up", config(tmp, tiny_model))
    assert up.returncode == 0, up.stderr
    grpc = re.search(r"grpc://(\S+)", up.stdout)
    assert grpc
    with connect(grpc[1]) as client:
        assert len(client.complete("x", max_tokens=3, ignore_eos=True)[0].token_ids) == 3
        pids = [rank.pid for group in client.status().groups for rank in group.ranks]
    again = existing_ray.baton("up", config(tmp, tiny_model))
    assert again.returncode == 2 and "already up" in again.stderr
    status = existing_ray.baton("status")
    assert all(str(pid) in status.stdout for pid in pids), status
    assert "default" in existing_ray.baton("down", "--name", "other").stderr
    assert existing_ray.baton("down").returncode == 0
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not alive
    assert existing_ray.baton("status").returncode == 1
    assert existing_ray.process.poll() is None, "the Ray cluster is not ours to end"


def test_an_engine_on_it_leaves_nothing_there(existing_ray: ExistingRay, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in existing_ray.environ.items():
        monkeypatch.setenv(name, value)
    settings = {"kv_memory": "8MiB", "max_model_len": 256, "ray.address": existing_ray.environ["RAY_ADDRESS"]}
    with Engine(str(tiny_model), settings) as engine:
        assert len(engine.generate("x", {"max_tokens": 3, "ignore_eos": True})[0].token_ids) == 3
        pids = [rank.pid for rank in engine.info.ranks]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not alive
    assert existing_ray.process.poll() is None


def test_too_few_slots_are_refused_with_numbers(existing_ray: ExistingRay, tiny_model: Path, tmp: Path) -> None:
    refused = existing_ray.baton("up", config(tmp, tiny_model, "decode: {dp: 8}\n"))
    assert refused.returncode == 1
    assert "decode-0 needs 8 baton_rank on one host" in refused.stderr
    assert existing_ray.baton("status").returncode == 1, "nothing was left behind"
