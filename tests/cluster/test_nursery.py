"""Workers are forked by a process that has imported for them; they see what they were given, and none outlives whom it must not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import worker_start
from cluster.nursery import nursery
from cluster.worker_start import program_and_arguments, socket_path

WAIT_S = 30.0
# Stands for Ray's worker: tells what it sees, then does what it reads.
WORKER = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "pid": os.getpid(), "directory": os.getcwd(),
                  "said": os.environ.get("SAID"), "preloaded": "colorsys" in sys.modules}), flush=True)
sys.exit(int(sys.stdin.readline() or 0))
"""
OPTIONS = ("--serialized-runtime-env-context={}", "--language=PYTHON")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a nursery needs Linux")


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "workers" / "worker.py"
    path.parent.mkdir()
    path.write_text(WORKER)
    return path


class Starter:
    """What a raylet runs to have a worker, and what that worker says."""

    def __init__(self, worker: Path, home: Path) -> None:
        command = [sys.executable, worker_start.__file__, str(worker), "--first", f"--temp-dir={home}", *OPTIONS]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=worker.parent, env={**os.environ, "SAID": "yes"}
        )
        assert self.process.stdout is not None
        self.said: dict[str, Any] = json.loads(self.process.stdout.readline())

    def end(self, code: int) -> int:
        """Tell the worker to exit; with which code its starter does."""
        self.process.communicate(f"{code}\n", timeout=WAIT_S)
        return self.process.returncode


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@contextlib.contextmanager
def listening(home: Path) -> Iterator[None]:
    """A nursery that has imported one small module. Its first child waits until it has."""
    with nursery(home, ["colorsys"]):
        while not socket_path(home).exists():
            pass
        yield


def ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(WAIT_S)
    return not psutil.pid_exists(pid)


def test_a_worker_is_what_it_would_have_been_without(worker: Path, home: Path) -> None:
    alone = Starter(worker, home)
    assert alone.said.pop("pid") == alone.process.pid
    assert not alone.said.pop("preloaded")
    assert alone.end(3) == 3
    with listening(home):
        forked = Starter(worker, home)
        assert forked.said.pop("pid") != forked.process.pid
        assert forked.said.pop("preloaded")
        assert forked.end(3) == 3
    assert forked.said == alone.said
    assert alone.said["argv"] == [str(worker), "--first", f"--temp-dir={home}"]
    assert alone.said["name"] == "__main__" and alone.said["path"] == str(worker.parent)
    assert alone.said["directory"] == str(worker.parent) and alone.said["said"] == "yes"


def test_starter_and_worker_end_together(worker: Path, home: Path) -> None:
    with listening(home):
        first, second = Starter(worker, home), Starter(worker, home)
        first.process.kill()
        assert ended(first.said["pid"])
        os.kill(second.said["pid"], signal.SIGKILL)
        assert second.process.wait(WAIT_S) == 128 + signal.SIGKILL
        third = Starter(worker, home)
        assert third.end(0) == 0
    for starter in (first, second):
        starter.process.communicate()


def test_workers_end_with_their_nursery(worker: Path, home: Path) -> None:
    with listening(home):
        starter = Starter(worker, home)
        os.kill(starter.said["pid"], signal.SIGSTOP)
    assert ended(starter.said["pid"])
    assert starter.process.wait(WAIT_S) == 1
    starter.process.communicate()


def test_a_nursery_that_cannot_import_leaves_workers_to_themselves(worker: Path, home: Path) -> None:
    with nursery(home, ["no_such_module"]):
        starter = Starter(worker, home)
        assert starter.said["pid"] == starter.process.pid
        assert starter.end(0) == 0


@given(st.lists(st.sampled_from(["-s", "-S"]), max_size=2), st.lists(st.text("ab=-", min_size=1).map("--x".__add__)))
def test_a_command_line_is_taken_apart(flags: list[str], arguments: list[str]) -> None:
    command = [*flags, "/ray/default_worker.py", *arguments, *OPTIONS]
    assert program_and_arguments(command) == ("/ray/default_worker.py", arguments)
    described = [*flags, "/ray/default_worker.py", *arguments, '--serialized-runtime-env-context={"env_vars": {"A": "1"}}']
    assert program_and_arguments(described) == ("/ray/setup_worker.py", described)
