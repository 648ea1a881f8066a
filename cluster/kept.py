"""A cluster held by a keeper process, seen from the process that asked for it.

Knows: how to start, ask, watch and end a keeper. Does not know: Ray; importing this module imports neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

import psutil

from baton.config import BatonConfig
from baton.errors import BatonError, DeadlineExceeded, InternalError, Unavailable
from cluster.local import connect_environment, environment, import_environment, make_home, remove_home
from cluster.machine import check_before_connecting, check_before_start
from cluster.messages import EVENT, Ask, ClusterInfo, Event, Failed, Launch, News, Progress, Question, Ready, Reply, Stage
from ranks.facts import RankCounts

_STOP_S = 60.0
_KILL_S = 10.0
# What outlives the keeper by more than this was orphaned by its sudden death.
_ORPHANS_S = 3.0
_ASK_S = 10.0
# The launch itself has ray.ready_s; this is for starting Ray before, and for taking down after a failure.
_EXTRA_START_S = 120.0
_KEEPER_LOG = "keeper.err"
# News that nobody asks for is kept up to this many; then the oldest goes.
_MAX_NEWS = 1024

Watch = Callable[[Stage | Progress], None]


class KeptCluster:
    """One cluster and its keeper process. Ends with `stop`, with the `with` block, or with this process, however it ends.

    Owner of the keeper's pipes, of the cluster's home directory and of the thread that reads events.
    Raises ConfigError at once for what this machine cannot run. The keeper is there before that is known, with nothing to do yet: what it
    imports takes most of a second, which is used to look at the machine and the model.
    """

    def __init__(self, config: BatonConfig, *, show_logs: bool = False) -> None:
        self._private = not config.ray.address
        self._config = config
        self._show_logs = show_logs
        self._home = make_home()
        self._ordered = False
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._events: queue.Queue[Event | None] = queue.Queue(_MAX_NEWS)
        self._pending: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.info: ClusterInfo | None = None
        try:
            self._spawn()
            self._config = check_before_start(config) if self._private else check_before_connecting(config)
        except BaseException:
            self.stop()
            raise

    def start(self, watch: Watch) -> ClusterInfo:
        """Start and block until the cluster serves, calling `watch` with every stage and progress.

        Raises what the launch failed with (its `__notes__` hold the log of the rank at fault); everything is taken down then,
        and also if `watch` or a signal raises.
        """
        try:
            order = Launch(config=self._config, home=str(self._home), private=self._private, show_logs=self._show_logs)
            self._ordered = True
            self._send(order.model_dump_json())
            self.info = self._until_ready(watch)
        except BaseException:
            self.stop()
            raise
        return self.info

    def _spawn(self) -> None:
        with (self._home / _KEEPER_LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.keeper", *([str(self._home)] if self._private else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if self._show_logs else log,
                env=self._environment(dict(os.environ)),
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C is ours to turn into an orderly stop
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="keeper-events", daemon=True)
        self._reader.start()

    def _environment(self, inherited: dict[str, str]) -> dict[str, str]:
        if self._private:
            return environment(self._home, inherited)
        return {**inherited, **import_environment(inherited), **connect_environment(inherited)}

    def _until_ready(self, watch: Watch) -> ClusterInfo:
        limit_s = self._config.ray.ready_s + _EXTRA_START_S
        while True:
            event = self._next(limit_s)
            if isinstance(event, Ready):
                return event.info
            if isinstance(event, Failed):
                raise _with_log(event.error.error(), event.log)
            if isinstance(event, Stage | Progress):
                watch(event)

    def wait_news(self, timeout_s: float | None = None) -> News | None:
        """What next happens to the running cluster by itself; None after `timeout_s`. Raises InternalError if the keeper ended."""
        with contextlib.suppress(queue.Empty):
            while event := self._events.get(timeout=timeout_s):
                if isinstance(event, News):
                    return event
            self._put(None)
            raise self._keeper_died()
        return None

    def processes(self) -> ClusterInfo:
        """The processes of this moment, and where clients connect; `info` says how they were when the cluster was new."""
        return ClusterInfo.model_validate(self._ask("processes"))

    def status(self) -> dict[str, Any]:
        """What the router says about groups, pairs, nodes and requests. Raises NodeLost while it is being started again."""
        answer: dict[str, Any] = self._ask("status")
        return answer

    def counts(self) -> list[RankCounts]:
        """What every living rank holds now, in rank order."""
        return [RankCounts(**facts) for facts in self._ask("counts")]

    def wind_down(self) -> None:
        """Take no more requests; return once those that run are over, or have had router.drain_s seconds. Then call `stop`."""
        self._ask("wind_down", _ASK_S + self._config.router.drain_s)

    def _ask(self, question: Ask, timeout_s: float = _ASK_S) -> Any:
        number = next(self._numbers)
        future: Future[Any] = Future()
        self._pending[number] = future
        self._send(Question(number=number, question=question).model_dump_json())
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the cluster did not answer {question} within {timeout_s:g} s", stage="cluster") from error
        finally:
            self._pending.pop(number, None)

    def stop(self) -> None:
        """Take everything down and wait until no process of the cluster is left. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            if not self._ordered:
                process.kill()  # it has started nothing, and imports what nobody needs any more
            _hang_up(process)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_KILL_S)
            _end(session_of(process.pid))
            assert self._reader is not None
            self._reader.join(_KILL_S)
        remove_home(self._home)

    def _next(self, timeout_s: float) -> Event:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty as error:
            raise DeadlineExceeded(f"the cluster said nothing for {timeout_s:g} s", stage="launch") from error
        if event is None:
            raise self._keeper_died()
        return event

    def _keeper_died(self) -> BatonError:
        log = self._home / _KEEPER_LOG
        written = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return _with_log(
            InternalError("the process that holds the cluster ended unexpectedly", stage="cluster", cause="keeper_lost"), written
        )

    def _send(self, line: str) -> None:
        process = self._process
        if process is None:
            raise Unavailable("the cluster has been stopped", stage="cluster", retryable=False)
        assert process.stdin is not None
        try:
            with self._lock:
                process.stdin.write(line + "\n")
                process.stdin.flush()
        except BrokenPipeError as error:
            raise self._keeper_died() from error

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Runs on the reader thread until the keeper closes its end."""
        assert process.stdout is not None
        try:
            with process.stdout as lines:
                for line in lines:
                    self._dispatch(EVENT.validate_json(line))
        finally:  # whatever happens, nobody waits for a thread that has ended
            for future in list(self._pending.values()):
                future.set_exception(InternalError("the cluster ended before it answered", stage="cluster"))
            self._put(None)

    def _dispatch(self, event: Event) -> None:
        if not isinstance(event, Reply):
            self._put(event)
            return
        future = self._pending.pop(event.number, None)
        if future is None:
            return  # asked by someone whose time ran out
        if event.error is not None:
            future.set_exception(event.error.error())
        else:
            future.set_result(event.answer)

    def _put(self, event: Event | None) -> None:
        while True:
            try:
                self._events.put_nowait(event)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):  # somebody has taken it meanwhile
                    self._events.get_nowait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()


def session_of(leader: int) -> list[psutil.Process]:
    """Every living process of the session of `leader`, who has ended, whoever its parent is by now.

    Should a keeper be killed, some of Ray's processes would stay for minutes, and no parent knows them any more: those that Ray was
    starting just then as well. A session's number is not given away while one of its processes lives.
    """
    found: list[psutil.Process] = []
    pids = psutil.pids()
    for pid in pids if leader not in pids else ():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _hang_up(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _end(processes: list[psutil.Process]) -> None:
    """Wait until all have ended; those that have not after _ORPHANS_S are killed."""
    _, alive = psutil.wait_procs(processes, timeout=_ORPHANS_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_KILL_S)


def _with_log(error: BatonError, log: str) -> BatonError:
    if log.strip():
        error.add_note("\n".join(log.strip().splitlines()[-30:]))
    return error
