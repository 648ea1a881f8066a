"""Virtual time jumps and never runs early, processes stop, go on and die as a whole, and what reaches nobody is found."""

import asyncio
from collections.abc import Iterator

import pytest

from simulator.loop import QUANTUM, Stuck, VirtualLoop


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()
    assert not loop.failures


def test_a_day_takes_no_time(loop):
    async def work():
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert loop.run(work()) == pytest.approx(86_400, abs=2 * QUANTUM)
    assert loop.num_events < 10


@pytest.mark.parametrize("clock_s", [0, 12_345])
def test_a_timer_is_never_early(loop, clock_s):
    seen = []

    async def work():
        for wait_s in (0.1, 1 / 3, 1e-9, 0.7):
            until_s = loop.time() + wait_s
            await asyncio.sleep(wait_s)
            seen.append(loop.time() >= until_s)

    async def wait():
        await loop.process("a", clock_s).spawn(work())

    loop.run(wait())
    assert seen == [True] * 4


def test_clocks_of_processes_differ(loop):
    async def look():
        return loop.time()

    async def work():
        return [await loop.process(name, clock_s).spawn(look()) for name, clock_s in (("a", 100), ("b", 2000))], loop.time()

    assert loop.run(work()) == ([100, 2000], 0)


def test_a_timeout_works_on_any_clock(loop):
    async def hang():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return loop.now_s

    async def work():
        return await loop.process("a", 77).spawn(hang())

    assert loop.run(work()) == pytest.approx(5, abs=2 * QUANTUM)


def test_a_killed_process_does_nothing_more_not_even_finally(loop):
    done = []
    process = loop.process("a")

    async def child():
        await asyncio.sleep(2)
        done.append("child")

    async def victim():
        try:
            process_task = asyncio.create_task(child())
            await process_task
        finally:
            done.append("finally")

    async def work():
        process.spawn(victim())
        await asyncio.sleep(1)
        process.kill()
        await asyncio.sleep(10)
        return list(done)

    assert loop.run(work()) == []


def test_a_stopped_process_goes_on_where_it_was(loop):
    times = []
    process = loop.process("a")

    async def tick():
        for _ in range(3):
            await asyncio.sleep(1)
            times.append(round(loop.now_s, 3))

    async def work():
        process.spawn(tick())
        await asyncio.sleep(1.5)
        process.stop()
        await asyncio.sleep(8.5)
        process.resume()
        await asyncio.sleep(5)

    loop.run(work())
    assert times == [1, 10, 11]


def test_what_a_process_makes_belongs_to_it(loop):
    process = loop.process("a")
    ran = []

    async def work():
        process.do(lambda: asyncio.get_running_loop().call_later(1, ran.append, "late"))
        await asyncio.sleep(0.5)
        process.kill()
        await asyncio.sleep(2)

    loop.run(work())
    assert ran == []


def test_deadlock_is_found(loop):
    async def work():
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="deadlock"):
        loop.run(work())


def test_livelock_is_found(loop):
    async def work():
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="livelock"):
        loop.run(work())


def test_a_callback_that_raises_ends_the_run():
    loop = VirtualLoop()

    async def work():
        loop.call_soon(lambda: [][0])
        await asyncio.sleep(1)

    with pytest.raises(IndexError):
        loop.run(work())
    loop.close()


def test_an_error_that_nobody_looked_at_is_a_failure():
    loop = VirtualLoop()

    async def fail():
        raise ValueError("unseen")

    async def work():
        task = asyncio.create_task(fail())
        await asyncio.sleep(1)
        assert task.done()

    loop.run(work())
    loop.close()
    assert [str(error) for error in loop.failures] == ["unseen"]


def test_sets_of_tasks_keep_their_order(loop):
    async def nothing():
        await asyncio.sleep(1)

    async def work():
        tasks = {asyncio.create_task(nothing(), name=str(i)) for i in range(50)}
        done, _ = await asyncio.wait(tasks)
        return [task.get_name() for task in done]

    assert loop.run(work()) == [str(i) for i in range(50)]


def test_an_executor_is_called_at_once_and_answers_a_turn_later(loop):
    async def work():
        with pytest.raises(ValueError, match="invalid literal"):
            await asyncio.to_thread(int, "x")
        return await asyncio.to_thread(int, "7")

    assert loop.run(work()) == 7


def test_coroutines_that_never_end_are_closed_quietly():
    loop = VirtualLoop()

    async def stubborn():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            await asyncio.sleep(1)

    async def work():
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(1)
        return task

    task = loop.run(work())
    loop.close()
    assert not loop.failures
    assert task.get_coro().cr_frame is None
