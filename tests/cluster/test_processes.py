"""A process is ended for certain, also while it is stopped; another that has its pid by now is left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from cluster.processes import kill, living, mark_of, marks_of, own_age_s, own_mark, this_machine

WAIT_S = 20.0


@contextlib.contextmanager
def running(program: str = "import sys; sys.stdin.read()") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_mark_says_who_and_since_when() -> None:
    mark = own_mark()
    assert (mark.pid, mark.machine) == (os.getpid(), this_machine())
    assert mark == mark_of(os.getpid())
    with running() as process:
        other = mark_of(process.pid)
        assert other is not None and other.began >= mark.began
        assert marks_of([process.pid, os.getpid()]) == [other, mark]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_is_killed_and_gone_even_if_it_is_stopped(stopped: bool) -> None:
    with running() as process:
        if stopped:
            process.send_signal(signal.SIGSTOP)
        marks = marks_of([process.pid])
        assert living(marks) == marks
        assert kill(marks, WAIT_S) == []
        assert living(marks) == [], "a zombie, whose parent has not asked for it yet, counts as gone"
        assert mark_of(process.pid) is None
        assert kill(marks, WAIT_S) == [], "once more does no harm"
        assert process.wait(WAIT_S) == -signal.SIGKILL


def test_whoever_has_the_pid_by_now_is_left_alone() -> None:
    with running() as process:
        (mark,) = marks_of([process.pid])
        earlier = [replace(mark, began=mark.began - 1), replace(mark, machine="another")]
        assert living(earlier) == kill(earlier, WAIT_S) == []
        assert process.poll() is None


def test_a_pid_of_nobody_is_nobody() -> None:
    with running() as process:
        pid = process.pid
    assert mark_of(pid) is None
    assert marks_of([pid]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can promise it")
def test_a_child_dies_with_its_parent_even_if_it_is_stopped() -> None:
    child = "from cluster.fate import die_with_parent; die_with_parent(); print(1, flush=True); import sys; sys.stdin.read()"
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); sys.stdin.read()"
    )
    with running(parent) as process:
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        orphan.suspend()
        process.kill()
        _, alive = psutil.wait_procs([orphan], timeout=WAIT_S)
        assert not [left for left in alive if left.status() != psutil.STATUS_ZOMBIE]


def test_a_process_knows_its_age() -> None:
    began = time.time() - own_age_s()
    assert abs(began - psutil.Process().create_time()) < 5
    assert own_age_s() > 0
