"""Two raylets on this machine, as if they were two hosts: the second is killed with everything on it, and started anew.

Knows the program that holds them (hosts.py), process trees, and what it takes to connect to a private Ray. Imports no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from pydantic import BaseModel

from baton.config import BatonConfig
from baton.deadline import now_s
from baton.errors import InternalError
from bench.chaos.faults import Fault, Record
from cluster.local import environment, make_home, remove_home

_START_S = 60.0
_END_S = 60.0
# As long as a host takes to come back whose power failed for a moment; Ray itself needs 12 s to call it dead.
_DOWN_S = 15.0


class Hosts(BaseModel):
    """What hosts.py says whenever both are up. first: the label by which Ray knows the first host; second_pid: the second's raylet."""

    address: str
    first: dict[str, str]
    second_pid: int


class Raylets:
    """Owner of the process that holds both. It ends with `close`, or with this process."""

    def __init__(self, home: Path, environ: dict[str, str], slots: tuple[int, int]) -> None:
        command = [sys.executable, "-m", "bench.chaos.hosts", str(home), *map(str, slots)]
        self._log = home / "hosts.err"
        with self._log.open("wb") as log:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=log, text=True, start_new_session=True)
        self._hosts = self._read()

    @property
    def settings(self) -> dict[str, object]:
        """What a cluster must be told to run there: all prefill nodes are on the first host."""
        return {"ray.address": self._hosts.address, "ray.prefill_label": self._hosts.first}

    async def kill(self, fault: Fault, record: Record) -> None:
        """SIGKILL of the second raylet and of all that runs below it, at once; some time later a new one takes its place."""
        raylet = psutil.Process(self._hosts.second_pid)
        doomed = [raylet, *raylet.children(recursive=True)]
        record.target, record.at_s = f"the second host, {len(doomed)} processes", now_s()
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.sleep(_DOWN_S)
        self._hosts = await asyncio.to_thread(self._start_again)

    def _start_again(self) -> Hosts:
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Hosts:
        """The next line. Raises InternalError if there is none in time."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(_START_S) else ""
        if not line:
            log = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise InternalError(f"Ray did not start within {_START_S:g} s: {log}", stage="ray")
        return Hosts.model_validate_json(line)

    def close(self) -> None:
        """End both, and whatever runs below them."""
        tree = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=_END_S)
        self._process.kill()
        self._process.wait(_END_S)
        for process in psutil.wait_procs(tree, timeout=0)[1]:
            process.kill()


@contextlib.contextmanager
def raylets(config: BatonConfig) -> Iterator[Raylets]:
    """Both raylets while the block lasts, and in this process's environment what connecting to them takes.

    There is room for exactly this cluster: one decode node on the second host, everything else on the first.
    """
    second = config.decode.dp * config.decode.tp
    home = make_home()
    given = environment(home, dict(os.environ))
    before = dict(os.environ)
    pair: Raylets | None = None
    try:
        pair = Raylets(home, given, (config.num_ranks - second, second))
        os.environ.update({name: value for name, value in given.items() if name.startswith("RAY_")})
        yield pair
    finally:
        if pair is not None:
            pair.close()
        os.environ.clear()
        os.environ.update(before)
        remove_home(home)
