"""The one thread of a rank on which it computes. Knows nothing of what runs there.

Not an executor of the standard library: those threads are joined when the interpreter ends, and a rank that has failed because a step
is stuck in native code would never die of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from baton.errors import Unavailable

Result = TypeVar("Result")
Work = tuple["asyncio.Future[Any]", Callable[[], Any]]

# How long one thread may keep the interpreter from another that wants it. With Python's own 5 ms a step that is ready to begin waits
# for whatever the event loop is doing just then, and the loop for the step's many small operations.
SWITCH_S = 0.0002


class StepThread:
    """Works one call after the other, from the first `run` until `close`. Owner: the rank's event loop."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="baton-step", daemon=True)
        self._begun = asyncio.Event()
        self._closed = False

    async def begun(self) -> None:
        """Until the call that was handed over last has begun. Whoever waits for it must give up with that call, which may never begin."""
        await self._begun.wait()

    async def run(self, call: Callable[[], Result]) -> Result:
        """What `call` returns or raises, once its turn has come. Raises Unavailable on a thread that is closed.

        The call is handed over before this awaits anything. A cancel is for the waiting: a call that has begun runs on.
        """
        if self._closed:
            raise Unavailable("the rank is closing", cause="closed")
        if self._thread.ident is None:
            self._thread.start()
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._begun.clear()
        self._work.put((future, call))
        return await future

    def close(self) -> None:
        """Begin nothing more; a call under way is left to itself. Those that wait for their turn are cancelled."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while (work := self._work.get_nowait()) is not None:
                work[0].cancel()
        self._work.put(None)

    def _main(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        while self._turn():
            continue

    def _turn(self) -> bool:
        """One call; False at the end. A function of its own, so that nothing of the call is kept while waiting for the next."""
        work = self._work.get()
        if work is None:
            return False
        future, call = work
        if not future.cancelled():
            _on_its_loop(future, self._begun.set)
            _settle(future, call)
        return True


def _settle(future: asyncio.Future[Result], call: Callable[[], Result]) -> None:
    try:
        result = call()
    except BaseException as error:  # it is raised where the call was made, whatever it is
        _answer(future, future.set_exception, error)
    else:
        _answer(future, future.set_result, result)


def _answer(future: asyncio.Future[Any], answer: Callable[[Any], None], value: Any) -> None:
    _on_its_loop(future, lambda: _answered(future, answer, value))


def _on_its_loop(future: asyncio.Future[Any], call: Callable[[], object]) -> None:
    """On the loop that waits for it; if that was closed meanwhile, nobody does any more."""
    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(call)


def _answered(future: asyncio.Future[Any], answer: Callable[[Any], None], value: Any) -> None:
    if not future.done():  # else whoever waited was cancelled
        answer(value)
