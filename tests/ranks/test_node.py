"""A rank's end: a failed step is always told to whoever watches, one that the shutdown broke off is not a failure."""

import asyncio
from pathlib import Path

import pytest

from baton.config import BatonConfig, RankPlan
from baton.engine.batch import Batch
from baton.engine.runner import StepOutcome
from baton.errors import BatonError, NodeLost
from ranks.drive import Drive
from ranks.facts import RankCounts
from ranks.host import RankHost
from ranks.node import RankLife
from tests.relay.inprocess import eventually


class Stepping:
    """A role that only steps: it was woken, and its one step ends when told, with an error. close_error: what closing raises."""

    def __init__(self, host: RankHost, close_error: Exception | None = None) -> None:
        self._host = host
        self._close_error = close_error
        self.in_step = asyncio.Event()
        self.left = asyncio.Event()
        self.told: list[BatonError | None] = []
        self.drive = Drive(self._step, self._wake, None)
        self.drive.wake(1)

    async def _step(self, batch: Batch | None) -> StepOutcome:
        self.in_step.set()
        await self.left.wait()
        raise NodeLost("the others are gone")

    async def _wake(self, epoch: int) -> None:
        """Nobody to wake."""

    async def open(self) -> None:
        """See Role."""

    def counts(self) -> RankCounts:
        """See Role."""
        return self._host.counts(0, True)

    async def close(self, error: BatonError | None) -> None:
        """See Role."""
        self.told.append(error)
        if self._close_error:
            raise self._close_error


async def start(tmp_path: Path, close_error: Exception | None = None) -> tuple[RankLife, Stepping]:
    config = BatonConfig(model=str(tmp_path))
    host = RankHost(RankPlan(config=config, role="prefill", node="prefill-0", rank=0, threads=1))
    await host.prepare()
    life, role = RankLife(host), Stepping(host, close_error)
    await life.start(lambda _: role)
    await role.in_step.wait()
    return life, role


@pytest.mark.parametrize("close_error", [None, RuntimeError("a bug in closing"), NodeLost("its peer has gone as well")])
async def test_a_failed_step_is_always_told_to_whoever_watches(tmp_path: Path, close_error: Exception | None) -> None:
    life, role = await start(tmp_path, close_error)
    role.left.set()
    await eventually(life.failed.is_set, "the verdict")
    assert isinstance(role.told[0], NodeLost)
    await life.host.close()


async def test_a_step_that_the_shutdown_broke_off_is_no_failure(tmp_path: Path) -> None:
    life, role = await start(tmp_path)
    stopping = asyncio.create_task(life.stop())
    await eventually(lambda: bool(role.told), "the stop")
    role.left.set()
    await stopping
    assert role.told == [None] and not life.failed.is_set()
