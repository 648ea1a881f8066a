"""Deadlines spend from the clock of the running loop, or of the system where there is none."""

import asyncio
import time

from baton.deadline import Deadline, now_s


class Shifted(asyncio.SelectorEventLoop):
    """A loop whose clock is a thousand seconds ahead."""

    def time(self) -> float:
        return super().time() + 1000.0


def test_without_a_loop_it_is_the_monotonic_clock() -> None:
    before = time.monotonic()
    assert before <= now_s() <= time.monotonic()


def test_in_a_loop_it_is_the_clock_of_the_loop() -> None:
    async def ask() -> tuple[float, float, Deadline]:
        return now_s(), asyncio.get_running_loop().time(), Deadline.after(5.0)

    with asyncio.Runner(loop_factory=Shifted) as runner:
        asked, there, deadline = runner.run(ask())
    assert 0.0 <= there - asked < 1.0
    assert asked - time.monotonic() > 900.0
    assert deadline.at_s - asked >= 5.0


def test_time_left_is_never_negative_and_the_sooner_one_counts() -> None:
    past = Deadline(now_s() - 1.0)
    assert past.left_s() == 0.0
    assert past.passed()
    assert past.sooner(10.0) == past
    later = Deadline.after(100.0)
    assert not later.passed()
    assert later.sooner(10.0).left_s() <= 10.0
