"""The drive of one rank on an event loop: it steps while there is work, and stops at once when the rank has failed."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from baton.engine.batch import Batch, Row, Sampled
from baton.engine.runner import StepOutcome
from baton.errors import NodeLost
from ranks.drive import Drive
from tests.relay.inprocess import eventually

NOTHING = Sampled(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32))


class Alone:
    """A rank whose domain is itself, with so many steps' work; a step ends when it may."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps
        self.applied = 0
        self.happened: list[str] = []  # since it was cleared
        self.may_end = asyncio.Event()
        self.drive = Drive(self._step, self._wake, self)

    def plan(self) -> Batch:
        self.happened.append("plan")
        return Batch.build([Row([1], 0, [0])] if self.left else [])

    def apply(self, sampled: Sampled) -> None:
        self.happened.append("apply")
        self.applied += 1
        self.left -= 1

    def tell(self) -> None:
        self.happened.append("tell")

    async def _step(self, batch: Batch | None) -> StepOutcome:
        assert batch is not None
        self.happened.append(f"step of {batch.num_tokens}")
        await self.may_end.wait()
        self.happened.append("step done")
        return StepOutcome(0, not batch.num_tokens, batch.num_tokens, NOTHING)

    async def _wake(self, epoch: int) -> None:
        """Nobody to wake."""


@pytest.fixture
async def rank() -> AsyncIterator[Alone]:
    yield Alone(3)


async def test_it_steps_until_there_is_no_work_and_again_when_poked(rank: Alone) -> None:
    running = asyncio.create_task(rank.drive.run())
    await eventually(lambda: rank.drive.under_way == 1, "a step")
    rank.may_end.set()
    await eventually(lambda: rank.applied == 3 and rank.drive.asleep, "the end of the work")
    assert rank.drive.under_way is None and rank.drive.steps == 3
    rank.left = 1
    rank.drive.poke()
    await eventually(lambda: rank.applied == 4, "another step")
    rank.drive.close()
    await running


@pytest.mark.parametrize("in_step", [False, True])
async def test_a_rank_that_has_failed_stops_now_and_takes_in_nothing_more(rank: Alone, in_step: bool) -> None:
    rank.left = 1 if in_step else 0
    running = asyncio.create_task(rank.drive.run())
    await eventually(lambda: (rank.drive.under_way is not None) is in_step, "the state to fail in")
    rank.drive.fail(NodeLost("the first reason"))
    rank.drive.fail(NodeLost("another"))
    with pytest.raises(NodeLost, match="the first reason"):
        await running
    rank.may_end.set()
    await asyncio.sleep(0)
    assert rank.applied == 0


async def test_a_failure_before_the_first_step_is_not_forgotten(rank: Alone) -> None:
    rank.drive.fail(NodeLost("too early"))
    with pytest.raises(NodeLost, match="too early"):
        await rank.drive.run()


async def test_what_a_step_brought_is_told_while_the_next_one_is_computed(rank: Alone) -> None:
    """Between the end of a step and the beginning of the next one nothing is done but to take in and to plan."""
    running = asyncio.create_task(rank.drive.run())
    await eventually(lambda: rank.happened == ["plan", "step of 1", "tell"], "a step")
    rank.happened.clear()
    rank.may_end.set()
    rank.may_end.clear()
    await eventually(lambda: rank.happened[-1:] == ["tell"], "its end is told")
    assert rank.happened == ["step done", "apply", "plan", "step of 1", "tell"] and rank.drive.under_way == 2
    rank.may_end.set()
    rank.drive.close()
    await running


async def test_nothing_is_told_before_the_next_step_has_begun(rank: Alone) -> None:
    has_begun = asyncio.Event()
    rank.drive = Drive(rank._step, rank._wake, rank, has_begun.wait)
    rank.left = 2
    rank.may_end.set()
    running = asyncio.create_task(rank.drive.run())
    await eventually(lambda: rank.happened[-1:] == ["step done"], "the end of the first step")
    await asyncio.sleep(0.02)
    assert "apply" not in rank.happened, "what it brought is taken in once the steps before are told"
    has_begun.set()
    await eventually(lambda: rank.applied == 2 and rank.drive.asleep, "the end of the work")
    rank.drive.close()
    await running


async def test_it_does_not_fall_asleep_before_everything_is_told(rank: Alone) -> None:
    rank.left = 1
    rank.may_end.set()
    running = asyncio.create_task(rank.drive.run())
    await eventually(lambda: rank.applied == 1 and rank.drive.asleep, "the end of the work")
    assert "tell" in rank.happened[rank.happened.index("apply") :]
    rank.drive.close()
    await running


async def test_a_planner_that_cannot_tell_ends_the_drive(rank: Alone) -> None:
    def tell() -> None:
        raise NodeLost("its bug")

    rank.may_end.set()
    rank.drive = Drive(rank._step, rank._wake, Mute(rank, tell))
    with pytest.raises(NodeLost, match="its bug"):
        await rank.drive.run()


class Mute:
    """A planner whose `tell` is another one."""

    def __init__(self, rank: Alone, tell: Callable[[], None]) -> None:
        self.plan, self.apply, self.tell = rank.plan, rank.apply, tell
