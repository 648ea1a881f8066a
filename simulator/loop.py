"""An event loop whose time is virtual, and simulated processes on it. Knows nothing of what runs there.

Time stands still while callbacks run and jumps to the next timer when none is ready, so hours cost no more than what happens in them.
Every callback belongs to the *process* that its context names: one that was killed never runs again, one that was stopped goes on
where it was. A callback of no process belongs to the world (network, supervisor, clients). Equal runs do equal things in equal
order: nothing here depends on where objects lie in memory, on the wall clock or on the garbage collector.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import math
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, TypeVarTuple

from baton.errors import InternalError

Result = TypeVar("Result")
Ts = TypeVarTuple("Ts")
QUANTUM = 2.0**-20  # seconds; times are multiples of it, so that clocks that differ by whole seconds add up exactly
MAX_EVENTS_AT_ONCE = 200_000  # events without any time passing: more is a livelock
_MAX_CLOSINGS = 20
_MAX_FAREWELLS = 4


class Stuck(Exception):
    """The simulated world can do nothing any more (deadlock), or does so without time passing (livelock)."""


class Process:
    """One simulated operating-system process. State owner: the loop that made it.

    clock_s: what its monotonic clock says beyond the world's; no two processes agree. after_event: called after each of its events.
    """

    def __init__(self, loop: VirtualLoop, name: str, clock_s: int) -> None:
        self.name = name
        self.clock_s = clock_s
        self.dead = False
        self.stopped = False
        self.halted = False  # dead or stopped: what the loop looks at
        self.after_event: Callable[[], None] | None = None
        self.context = contextvars.copy_context()
        self.context.run(_PROCESS.set, self)
        self._loop = loop
        self._parked: list[VirtualHandle] = []

    def __repr__(self) -> str:
        return f"<{self.name}{' dead' * self.dead}{' stopped' * self.stopped}>"

    def do(self, call: Callable[..., object], *args: object) -> None:
        """Have the process itself make a call soon, in its turn."""
        self._loop.call_soon(call, *args, context=self.context)

    def spawn(self, work: Coroutine[Any, Any, Result], name: str = "") -> asyncio.Task[Result]:
        """A task of the process."""
        return self._loop.create_task(work, name=name or self.name, context=self.context.copy())

    def kill(self) -> None:
        """SIGKILL: nothing of it ever runs again, no `finally` either."""
        self.dead = self.halted = True

    def stop(self) -> None:
        """SIGSTOP: what is due waits until it is continued; its timers do not wait, and fire together then."""
        self.stopped = self.halted = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.halted = self.dead
        if not self.dead:
            self.let_go()

    def hold(self, handle: VirtualHandle) -> None:
        """Keep what cannot run now, and may never."""
        self._parked.append(handle)

    def let_go(self) -> None:
        """Run what was kept."""
        parked, self._parked = self._parked, []
        for handle in parked:
            self._loop.ready(handle)


_PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


class VirtualHandle(asyncio.TimerHandle):
    """A call to come. Slimmer than asyncio's own: millions are made."""

    __slots__ = ("args", "call", "context", "dropped", "due_s")

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context, due_s: float = 0.0) -> None:
        self.call: Callable[..., object] | None = call
        self.args = args
        self.context = context
        self.dropped = False
        self.due_s = due_s  # on the clock of whoever asked

    def cancel(self) -> None:
        """Do nothing when the time comes."""
        self.dropped = True
        self.call, self.args = None, ()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.dropped

    def when(self) -> float:
        """When it is due."""
        return self.due_s

    def __repr__(self) -> str:
        return f"<call {self.call} at {self.due_s}>"


class VirtualTask(asyncio.Task[Any]):
    """A task with a number for a hash, so that sets of tasks keep the same order in every run. process: whose it is, if anybody's."""

    def __init__(
        self, number: int, work: Coroutine[Any, Any, Any] | Generator[Any, None, Any], process: Process | None, **named: Any
    ) -> None:
        self.process = process
        self._number = number
        super().__init__(work, **named)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """One simulated world. `run` it to an end, then `close` it; neither threads nor sockets take part.

    failures: errors that reached nobody (callbacks that raised, tasks whose error was never looked at): each is a bug.
    digest: of all that was marked and when; equal only for equal runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0  # the world's time
        self.num_events = 0
        self.digest = 0
        self.num_unheard = 0  # errors of those that were cancelled at the end of the world
        self.failures: list[BaseException | str] = []
        self.world = contextvars.Context()
        self._clock_s = 0  # of the process whose event runs
        self._ready_now: deque[VirtualHandle] = deque()
        self._timers: list[tuple[float, int, VirtualHandle]] = []
        self._num_timers = 0
        self._tasks: list[VirtualTask] = []
        self._processes: list[Process] = []
        self._over = False

    def process(self, name: str, clock_s: int = 0) -> Process:
        """A new process. clock_s: whole seconds that its clock is ahead."""
        process = Process(self, name, clock_s)
        self._processes.append(process)
        return process

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run the world until `work`, which belongs to no process, is done. Raises what it raises, Stuck, and the first of `failures`."""
        asyncio._set_running_loop(self)
        try:
            task: asyncio.Task[Result] = self.create_task(work, context=self.world.copy())
            self._run_until(task)
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def _run_until(self, task: asyncio.Task[Any]) -> None:
        ready = self._ready_now
        at_once = 0
        while not task.done():
            while ready:
                self._turn(ready.popleft())
                if self.failures:
                    raise self._first_failure()
                at_once += 1
                if at_once > MAX_EVENTS_AT_ONCE:
                    raise Stuck(f"livelock: {at_once} events, and it is still {self.now_s:.6f} s")
            if not task.done():
                at_once = 0
                self._jump()

    def _turn(self, handle: VirtualHandle) -> None:
        call = handle.call
        if call is None:
            return
        process = handle.context.get(_PROCESS)
        if process is None:
            self._clock_s = 0
        elif process.halted:
            process.hold(handle)
            return
        else:
            self._clock_s = process.clock_s
        self.num_events += 1
        try:
            handle.context.run(call, *handle.args)
            if process is not None and process.after_event is not None:
                process.after_event()
        except (Exception, asyncio.CancelledError) as error:
            self.failures.append(error)

    def _jump(self) -> None:
        """Let time pass until the next timer that still counts."""
        while self._timers:
            at_s, _, handle = heapq.heappop(self._timers)
            if handle.call is not None:
                self.now_s = at_s
                self._ready_now.append(handle)
                return
        raise Stuck(f"deadlock at {self.now_s:.6f} s: nothing is ready and no timer runs")

    def _first_failure(self) -> BaseException:
        first = self.failures[0]
        return InternalError(first) if isinstance(first, str) else first

    # What asyncio asks of a loop.

    def time(self) -> float:
        """Seconds on the clock of the process whose event runs."""
        return self.now_s + self._clock_s

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None) -> VirtualHandle:
        """See asyncio."""
        handle = VirtualHandle(callback, args, contextvars.copy_context() if context is None else context)
        self._ready_now.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> VirtualHandle:
        """See asyncio."""
        return self.call_at(self.now_s + self._clock_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> VirtualHandle:
        """See asyncio. `when` is on the clock of the process whose event runs; never fires early."""
        handle = VirtualHandle(callback, args, contextvars.copy_context() if context is None else context, when)
        if when < math.inf:
            self._enter(when - self._clock_s, handle)
        return handle

    def later(self, delay_s: float, call: Callable[..., object], *args: Any) -> VirtualHandle:
        """A call of the world's, whichever process asks for it."""
        handle = VirtualHandle(call, args, self.world, self.now_s + delay_s)
        self._enter(handle.due_s, handle)
        return handle

    def _enter(self, at_s: float, handle: VirtualHandle) -> None:
        at_s = math.ceil(max(at_s, self.now_s) / QUANTUM) * QUANTUM
        self._num_timers += 1
        heapq.heappush(self._timers, (at_s, self._num_timers, handle))

    def mark(self, what: int) -> None:
        """Something happens now that another run should have happen too."""
        self.digest = hash((self.digest, self.now_s, what))

    def ready(self, handle: VirtualHandle) -> None:
        """Run a call that had to wait."""
        self._ready_now.append(handle)

    def create_task(self, coro: Any, *, name: object = None, context: contextvars.Context | None = None) -> VirtualTask:
        """See asyncio."""
        number = len(self._tasks)
        process = _PROCESS.get(None) if context is None else context.get(_PROCESS)
        task = VirtualTask(number, coro, process, loop=self, name=str(name or number), context=context)
        self._tasks.append(task)  # which also keeps those of dead processes from being collected, and their `finally` from running
        return task

    def run_in_executor(self, executor: object, func: Callable[[*Ts], Result], *args: *Ts) -> asyncio.Future[Result]:
        """Call it at once; whoever waits for it hears of it a turn later."""
        future: asyncio.Future[Result] = self.create_future()
        try:
            self.call_soon(_settle, future, func(*args), None)
        except Exception as error:
            self.call_soon(_settle, future, None, error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """See asyncio: here an error that reached nobody is a failure of the run."""
        if not self._over:
            self.failures.append(context.get("exception") or str(context.get("message")))

    def is_running(self) -> bool:
        """See asyncio."""
        return asyncio._get_running_loop() is self

    def close(self) -> None:
        """End the world: whoever still waits is cancelled, and heard by nobody. Adds errors that nobody ever looked at to `failures`."""
        self._look_at(self._tasks)
        self._over = True
        found = list(self.failures)
        for process in self._processes:
            process.let_go()
        asyncio._set_running_loop(self)
        try:
            for _ in range(_MAX_FAREWELLS):
                self._bid_farewell()
            for task in self._tasks:
                self._put_down(task)
        finally:
            asyncio._set_running_loop(None)
        self._ready_now.clear()
        self._timers.clear()
        self._tasks.clear()
        self.failures = found
        super().close()

    def _bid_farewell(self) -> None:
        """Let everybody, the dead too, run their `finally` blocks in a world that hears nothing any more, and in which no time passes."""
        for task in self._tasks:
            task.cancel()
        for _ in range(MAX_EVENTS_AT_ONCE):
            if not self._ready_now:
                return
            handle = self._ready_now.popleft()
            if handle.call is not None:
                try:
                    handle.context.run(handle.call, *handle.args)
                except (Exception, asyncio.CancelledError):
                    self.num_unheard += 1

    def _look_at(self, tasks: list[VirtualTask]) -> None:
        for task in tasks:
            if task.done() and task._log_traceback:
                task._log_traceback = False
                heard = task.process is None or not task.process.dead
                self.failures += [error for error in [task.exception()] if error and heard]

    @staticmethod
    def _put_down(task: VirtualTask) -> None:
        """Close a coroutine that will never go on. Its `finally` blocks run into a world that hears nothing any more."""
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        work = task.get_coro()
        for _ in range(_MAX_CLOSINGS):
            if task.done() or not isinstance(work, Coroutine):
                return
            with contextlib.suppress(RuntimeError, BaseExceptionGroup):  # it awaits something on its way out: again, from there on
                work.close()
                return


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
