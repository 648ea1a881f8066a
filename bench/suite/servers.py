"""Servers as processes: started, waited for, frozen while another is measured, ended with all their descendants. Knows their commands.

Owner of a server's processes: the `with` block. A frozen server (SIGSTOP) computes nothing, so that one which takes minutes to start
need not start anew for every round; whoever kills this program with SIGKILL leaves it behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from baton.deadline import Deadline
from baton.errors import DeadlineExceeded, Unavailable

_START_S = 400.0
_END_S = 60.0
_KILL_S = 10.0
_POLL_S = 0.1
_FREEZE_S = 10.0
_HEALTH_S = 5.0
_LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a server and how to end it. port: of its HTTP door."""

    name: str
    words: Sequence[str]
    port: int
    ending: signal.Signals
    env: Mapping[str, str]
    grpc_port: int = 0

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def baton(model: Path) -> Command:
    """Baton as `baton serve` starts it: one prefill and one decode node, all settings at their defaults."""
    http, grpc = free_port(), free_port()
    words = [sys.executable, "-m", "baton", "serve", "--model", str(model), "--http-port", str(http), "--grpc-port", str(grpc)]
    return Command("baton", words, http, signal.SIGINT, {}, grpc)


def vllm(model: Path, peer: Path) -> Command:
    """vLLM's CPU build on all cores; by default it leaves one idle."""
    port = free_port()
    words = [str(peer / "bin" / "vllm"), "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "4096"]
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Command("vllm", words, port, signal.SIGTERM, env)


class Server:
    """One server's processes. ready_s: from its start until it answered, once `wait_ready` has returned."""

    def __init__(self, command: Command, logs: Path) -> None:
        self.command = command
        self.ready_s = 0.0
        self._log = logs / f"{command.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[psutil.Process] = []

    def __enter__(self) -> Self:
        """Start it. It lives in a session of its own, so that a terminal's Ctrl-C is ours to turn into an orderly end."""
        with self._log.open("wb") as log:
            env = {**os.environ, **self.command.env}
            self._process = subprocess.Popen(self.command.words, stdout=log, stderr=log, env=env, start_new_session=True)
        began_s = time.monotonic()
        try:
            self._until_healthy(began_s)
        except BaseException:
            self._end()
            raise
        self.ready_s = time.monotonic() - began_s
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def freeze(self) -> None:
        """Stop all its processes where they are, those it is just starting too. Raises DeadlineExceeded if they do not."""
        deadline = Deadline.after(_FREEZE_S)
        self._frozen = self.processes()
        while moving := [process for process in self._frozen if not _stands_still(process)]:
            if deadline.passed():
                raise DeadlineExceeded(f"{len(moving)} processes of {self.command.name} cannot be frozen", stage="bench")
            for process in moving:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            time.sleep(_POLL_S)  # a signal is delivered when its process is next seen by the kernel
            self._frozen = self.processes()

    def thaw(self) -> None:
        """Let them go on. Raises Unavailable if it does not answer any more."""
        self._continue()
        deadline = Deadline.after(_END_S)
        while not self._healthy():
            if deadline.passed():
                raise Unavailable(f"{self.command.name} does not answer after it was frozen; {self._said()}", stage="bench")
            time.sleep(_POLL_S)

    def _continue(self) -> None:
        frozen, self._frozen = self._frozen, []
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _until_healthy(self, began_s: float) -> None:
        assert self._process is not None
        while not self._healthy():
            if self._process.poll() is not None:
                raise Unavailable(f"{self.command.name} ended with {self._process.returncode}; {self._said()}", stage="bench")
            if time.monotonic() - began_s > _START_S:
                raise DeadlineExceeded(f"{self.command.name} was not ready after {_START_S:g} s; {self._said()}", stage="bench")
            time.sleep(_POLL_S)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.command.url}/health", timeout=_HEALTH_S) as reply:
                healthy: bool = reply.status == 200
                return healthy
        except OSError:  # also a status that is no success
            return False

    def _said(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return "its log ends with:\n" + "\n".join(lines)

    def processes(self) -> list[psutil.Process]:
        """Its first process and all that descend from it, now."""
        assert self._process is not None
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _end(self) -> None:
        """Ask it to end, wait, and kill what is left of it."""
        process, self._process = self._process, None
        if process is None:
            return
        self._process = process
        family = self.processes()
        self._continue()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(self.command.ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        _, left = psutil.wait_procs(family, timeout=3)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=_KILL_S)
        process.wait(_KILL_S)
        self._process = None


def _stands_still(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
