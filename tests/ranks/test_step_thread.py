"""The thread that computes: one call after the other, results and errors back on the loop, and no process outlives its will to end."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import pytest

from baton.errors import Unavailable
from ranks.step_thread import StepThread
from tests.relay.inprocess import eventually


async def test_calls_run_one_after_the_other_on_one_thread() -> None:
    thread = StepThread()
    idents = await asyncio.gather(*(thread.run(threading.get_ident) for _ in range(20)))
    assert len(set(idents)) == 1 and idents[0] != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    assert await thread.run(lambda: "goes on") == "goes on"
    thread.close()


async def test_a_closed_thread_leaves_the_call_under_way_alone_and_begins_no_other() -> None:
    thread, begun, may_end = StepThread(), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert may_end.wait(10)
        return "done"

    first = asyncio.create_task(thread.run(slow))
    second = asyncio.create_task(thread.run(lambda: "never"))
    await asyncio.to_thread(begun.wait, 10)
    thread.close()
    thread.close()
    with pytest.raises(asyncio.CancelledError):
        await second
    with pytest.raises(Unavailable):
        await thread.run(lambda: "never")
    may_end.set()
    assert await first == "done"


async def test_it_is_told_when_a_call_has_begun() -> None:
    thread, may_begin, may_end = StepThread(), threading.Event(), threading.Event()
    first = asyncio.create_task(thread.run(lambda: may_begin.wait(10)))
    second = asyncio.create_task(thread.run(lambda: may_end.wait(10)))
    await asyncio.sleep(0)
    begun = asyncio.create_task(thread.begun())
    may_begin.set()
    assert await first
    await begun
    assert not second.done()
    may_end.set()
    assert await second
    thread.close()


class Large:
    """Something that should not be kept."""


async def test_nothing_of_a_call_is_kept_when_it_is_over() -> None:
    thread = StepThread()
    made = await thread.run(Large)
    seen = weakref.ref(made)
    await thread.run(lambda: None)
    del made
    await eventually(lambda: gc.collect() >= 0 and seen() is None, "the end of what was made")
    thread.close()


def test_a_process_ends_although_its_step_is_stuck_in_native_code() -> None:
    """`pause` of the C library neither returns nor is interrupted here; an executor of the standard library would be joined at exit."""
    program = """if True:
        import asyncio, ctypes, threading
        from ranks.step_thread import StepThread
        async def main():
            thread, begun = StepThread(), threading.Event()
            def stuck():
                begun.set()
                ctypes.CDLL(None).pause()
            waiting = asyncio.create_task(thread.run(stuck))
            await asyncio.to_thread(begun.wait)
            thread.close()
            waiting.cancel()
        asyncio.run(main())
    """
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
