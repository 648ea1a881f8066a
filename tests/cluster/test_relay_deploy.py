"""`baton up`, `status` and `down` on a Ray cluster that was there before, and stays; what the cluster does while no command runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from baton.client import SyncClient, connect
from cluster.local import environment, make_home
from cluster.offline import Engine
from tests.cluster.footprint import short_tmp
from tests.cluster.test_local import start

pytestmark = [pytest.mark.relay, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class ExistingRay:
    environ: dict[str, str]
    process: subprocess.Popen[str]

    def baton(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def existing_ray() -> Iterator[ExistingRay]:
    with short_tmp() as tmp, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp))
        home = make_home()
        process = start(home)
        assert process.stdout is not None
        *_, address = process.stdout.readline().split()
        yield ExistingRay({**environment(home, dict(os.environ)), "RAY_ADDRESS": address}, process)
        process.communicate(timeout=60)


def config(tmp: Path, model: Path, more: str = "") -> str:
    path = tmp / "cluster.yaml"
    path.write_text(f"model: {model}\nkv_memory: 8MiB\nmax_model_len: 256\nrouter: {{http_port: 0, grpc_port: 0}}\n{more}")
    return str(path)


def until(said: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not said():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def test_a_cluster_outlives_up_and_its_supervisor_and_ends_with_down(existing_ray: ExistingRay, tiny_model: Path, tmp: Path) -> None:
    """Killed are a rank (built again though no command runs) and the supervisor (the next takes over); `down` meets one that is stopped."""
    assert existing_ray.baton("status").returncode == 1
    up = existing_ray.baton("up", config(tmp, tiny_model))
    assert up.returncode == 0, up.stderr
    assert "loading ..." in up.stderr and "proving ..." in up.stderr
    grpc = re.search(r"grpc://(\S+)", up.stdout)
    assert grpc
    again = existing_ray.baton("up", config(tmp, tiny_model))
    assert again.returncode == 2 and "already up" in again.stderr
    with connect(grpc[1]) as client:
        (expected,) = client.complete("x", max_tokens=3, ignore_eos=True, temperature=0.0)
        before = pids(client)
        os.kill(before["decode-0"], signal.SIGKILL)
        until(lambda: pids(client).get("decode-0", before["decode-0"]) != before["decode-0"])
        assert client.complete("x", max_tokens=3, ignore_eos=True, temperature=0.0)[0].token_ids == expected.token_ids
        rebuilt = pids(client)
        assert rebuilt["prefill-0"] == before["prefill-0"]
        supervisor = supervisor_pid(existing_ray)
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: supervisor_pid(existing_ray) not in (0, supervisor))
        assert pids(client) == rebuilt, "what runs is taken over, not built again"
        for pid in (supervisor_pid(existing_ray), rebuilt["prefill-0"]):  # what the next supervisor finds is not whole
            os.kill(pid, signal.SIGKILL)
        until(lambda: pids(client).get("prefill-0", rebuilt["prefill-0"]) != rebuilt["prefill-0"])
        assert client.complete("x", max_tokens=3, ignore_eos=True, temperature=0.0)[0].token_ids == expected.token_ids
        last = pids(client)
    status = existing_ray.baton("status")
    assert all(str(pid) in status.stdout for pid in last.values()), status
    assert re.search(r"decode-0 +serving +2 ", status.stdout), status
    assert "default" in existing_ray.baton("down", "--name", "other").stderr
    os.kill(last["decode-0"], signal.SIGSTOP)
    down = existing_ray.baton("down")
    assert down.returncode == 0, down
    assert down.stdout == "default is down: 4 processes ended, 0 left, 0 placement groups left\n"
    assert not [pid for pid in (*before.values(), *rebuilt.values(), *last.values()) if psutil.pid_exists(pid)]
    assert existing_ray.baton("status").returncode == 1
    assert existing_ray.process.poll() is None, "the Ray cluster is not ours to end"


def pids(client: SyncClient) -> dict[str, int]:
    return {group.node: rank.pid for group in client.status().groups if group.state == "ready" for rank in group.ranks}


def supervisor_pid(existing_ray: ExistingRay) -> int:
    found = re.search(r"kept by the supervisor, pid (\d+)", existing_ray.baton("status").stdout)
    return int(found[1]) if found else 0


def test_a_launch_that_is_broken_off_or_fails_leaves_nothing(existing_ray: ExistingRay, tiny_model: Path, tmp: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "up", config(tmp, tiny_model)]
    with subprocess.Popen(command, env=existing_ray.environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "loading" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert existing_ray.baton("status").returncode == 1, "nothing was left behind"
    refused = existing_ray.baton("up", config(tmp, tiny_model, "decode: {dp: 8}\n"))
    assert refused.returncode == 1
    assert "decode-0 needs 8 baton_rank on one host" in refused.stderr
    assert existing_ray.baton("status").returncode == 1, "nothing was left behind"


def test_what_is_no_ray_or_does_not_let_us_in_is_an_error_soon(existing_ray: ExistingRay, tmp: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        refused = existing_ray.baton("status", "--ray-address", f"127.0.0.1:{deaf.getsockname()[1]}")
    assert refused.returncode == 1
    assert "is no Ray cluster that lets us in" in refused.stderr.splitlines()[-1]
    (tmp / "token").write_text("0" * 64)
    stranger = ExistingRay({**existing_ray.environ, "RAY_AUTH_TOKEN_PATH": str(tmp / "token")}, existing_ray.process)
    refused = stranger.baton("status")
    assert refused.returncode == 1
    assert "InvalidAuthToken" in refused.stderr.splitlines()[-1]


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
