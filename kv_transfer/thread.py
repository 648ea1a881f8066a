"""The one transfer thread of a rank: waits on sockets and timers, and copies in slices between. Knows no transport.

Everything on it is a short callback, so that a peer that hangs holds up nobody else. It is not an asyncio loop: the rank's loop runs
gRPC and must not carry bytes, and scatter-gather sockets want plain readiness.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from itertools import count
from typing import Any, TypeVar

from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded, InternalError, Unavailable
from kv_transfer.transport import Ticket

T = TypeVar("T")
MAX_PATIENCE_S = 3600.0  # between two looks at the clock: a selector cannot wait for just any number of seconds
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """A call to come; `cancel` makes it do nothing."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do nothing when the time comes."""
        self._call = None

    def fire(self) -> None:
        """The time has come."""
        if self._call is not None:
            self._call()


class TransferThread:
    """Starts with the object, ends with `close` (or with a bug: `failure` then says which, and every read fails with it).

    failed: told of that failure, on this thread: whoever lives on without it can neither read nor be read.
    `post`, `run`, `ticket` and `close` may be called from any thread, everything else only on this one.
    """

    def __init__(self, name: str = "baton-transfer", *, failed: Callable[[BatonError], object] | None = None) -> None:
        self._failed = failed
        self.failure: BatonError | None = None
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._pending: set[Future[Any]] = set()  # each ends by its result, at the latest in _finish
        self._open = True
        self._stopping = False
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._work: deque[Iterator[None]] = deque()
        self._spare: deque[Iterator[None]] = deque()
        self._exits: list[Callable[[BatonError], None]] = []
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, READ, self._woken)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes work."""
        return self._open

    def post(self, call: Callable[[], None]) -> bool:
        """Have `call` run on the thread soon; False if the thread has ended, so that it never will."""
        with self._lock:
            if not self._open:
                return False
            self._calls.append(call)
            if len(self._calls) == 1:  # else the thread was woken for those before, and looks for more before it sleeps
                os.eventfd_write(self._wake_fd, 1)
            return True

    def run(self, call: Callable[[], T], deadline: Deadline) -> T:
        """The result of `call`, run on the thread while the caller waits. Raises what it raises, DeadlineExceeded or Unavailable."""
        assert threading.current_thread() is not self._thread, "the transfer thread cannot wait for itself"
        future: Future[T] = Future()
        self._keep(future)
        self.post(lambda: _resolve(future, call))
        try:
            return future.result(deadline.left_s())
        except FutureTimeout:
            raise DeadlineExceeded("the transfer thread has not answered in time", stage="pull") from None

    def ticket(self) -> Ticket:
        """A ticket that certainly ends: at the latest with this thread."""
        ticket = Ticket(self._post_stop)
        self._keep(ticket.future)
        return ticket

    def close(self, deadline: Deadline | None = None) -> None:
        """End all reads, close what was registered with `on_exit`, and join. Raises DeadlineExceeded if it does not end (default 10 s)."""
        self.post(self._stop)
        self._thread.join((deadline or Deadline.after(10.0)).left_s())
        if self._thread.is_alive():
            raise DeadlineExceeded("the transfer thread does not end", stage="pull")

    def on_exit(self, call: Callable[[BatonError], None]) -> None:
        """Have `call(why)` run at the end of the thread, to close sockets."""
        self._exits.append(call)

    def off_exit(self, call: Callable[[BatonError], None]) -> None:
        """Take back an `on_exit`."""
        self._exits.remove(call)

    def watch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Call `ready(events)` whenever the socket can be read or written; replaces an earlier watch of it."""
        if sock.fileno() in self._selector.get_map():
            self._selector.modify(sock, events, ready)
        else:
            self._selector.register(sock, events, ready)

    def unwatch(self, sock: socket.socket) -> None:
        """Watch no more; to be called before the socket is closed."""
        if sock.fileno() in self._selector.get_map():
            self._selector.unregister(sock)

    def at(self, deadline: Deadline, call: Callable[[], None]) -> Timer:
        """Call once the deadline has passed, unless cancelled."""
        timer = Timer(call)
        heapq.heappush(self._timers, (deadline.at_s, next(self._order), timer))
        return timer

    def work(self, slices: Iterator[None]) -> None:
        """Run an iterator to its end, a step at a time, in turn with all others."""
        self._work.append(slices)

    def spare(self, slices: Iterator[None]) -> None:
        """The same for what nobody waits for: only while there is no other work."""
        self._spare.append(slices)

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            self.failure = InternalError(f"the transfer thread failed: {error!r}", stage="pull")
            if self._failed is not None:
                self._failed(self.failure)
            raise
        finally:
            self._finish()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._patience_s()):
            # A callback may have closed or changed another socket of this batch; what is still ready comes again.
            if self._selector.get_map().get(key.fd) is key:
                key.data(events)
        self._run_calls()
        self._run_timers()
        self._run_slice()

    def _patience_s(self) -> float | None:
        if self._work or self._spare or self._calls:
            return 0
        return min(max(0.0, self._timers[0][0] - time.monotonic()), MAX_PATIENCE_S) if self._timers else None

    def _woken(self, _: int) -> None:
        os.eventfd_read(self._wake_fd)

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2].fire()

    def _run_slice(self) -> None:
        line = self._work or self._spare
        if line:
            slices = line.popleft()
            if next(slices, _END) is not _END:
                line.append(slices)

    def _stop(self) -> None:
        self._stopping = True

    def _finish(self) -> None:
        """The thread's last act: after it nothing of ours can write, so whatever has not ended ends here."""
        with self._lock:
            self._open = False
            self._calls.clear()
        why = self._over()
        with contextlib.ExitStack() as last_to_first:  # one that fails keeps none of the others from ending
            last_to_first.callback(os.close, self._wake_fd)
            last_to_first.callback(self._selector.close)
            last_to_first.callback(self._end_pending, why)
            for exit_call in tuple(self._exits):
                last_to_first.callback(exit_call, why)

    def _end_pending(self, why: BatonError) -> None:
        for future in tuple(self._pending):
            future.set_exception(why)
        for kept in (self._exits, self._timers, self._work, self._spare):  # they hold mappings
            kept.clear()

    def _post_stop(self, call: Callable[[], None]) -> None:
        self.post(call)  # a thread that has ended has ended the read, too

    def _keep(self, future: Future[Any]) -> None:
        """See to it that the future ends with this thread, or now if that has ended."""
        with self._lock:
            is_open = self._open
            if is_open:
                self._pending.add(future)
        if is_open:
            future.add_done_callback(self._forget)
        else:
            future.set_exception(self._over())

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._pending.discard(future)

    def _over(self) -> BatonError:
        return self.failure or Unavailable("the transfer thread has ended", stage="pull", cause="closed")


_END = object()


def _resolve(future: Future[T], call: Callable[[], T]) -> None:
    """Carry a result or an error of ours to the waiting thread; anything else is a bug and ends the transfer thread."""
    try:
        result = call()
    except (BatonError, OSError) as error:
        future.set_exception(error)
    else:
        future.set_result(result)
