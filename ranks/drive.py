"""The loop that steps one rank: asleep on a local condition while idle, in lock step with its domain while awake.

Knows when to step, not what: a Planner decides (leaders) or the leader's broadcast does (followers). See WakeState for the rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from baton.engine.batch import Batch, Sampled
from baton.engine.lockstep import MOST_AHEAD, WakeState
from baton.engine.runner import StepOutcome
from baton.errors import BatonError, InvalidRequest

Step = Callable[[Batch | None], Awaitable[StepOutcome]]
WakeOthers = Callable[[int], Awaitable[None]]
Begun = Callable[[], Awaitable[None]]


class Planner(Protocol):
    """Who decides a leader's steps. Called on the event loop: plan, then apply if there was work, and plan again, which nothing comes
    between. What can wait until the next step is under way is left to `tell`.
    """

    def plan(self) -> Batch:
        """The next step's work, empty if there is none now."""

    def apply(self, sampled: Sampled) -> None:
        """Take in what the planned step drew. As little as the next plan needs: no rank computes meanwhile."""

    def tell(self) -> None:
        """Tell whom it concerns what the steps before have brought; the next one is being computed, or there is none now."""


class Drive:
    """Steps one rank until closed. State owner: the rank's event loop.

    A step that raises ends the drive, and so does `fail`: the rank's process group is then unusable and the node is rebuilt as a unit.
    """

    def __init__(self, step: Step, wake_others: WakeOthers, planner: Planner | None, begun: Begun | None = None) -> None:
        """begun: returns once the step that was asked for last is really under way."""
        self._step = step
        self._begun = begun
        self._wake_others = wake_others
        self._planner = planner
        self._state = WakeState()
        self._nudge = asyncio.Event()
        self._closing = False
        self._failure: BatonError | None = None
        self._failed = asyncio.Event()
        self._in_step = False
        self.steps = 0
        self.busy_s = 0.0

    @property
    def asleep(self) -> bool:
        """Whether the rank waits for work or a wake."""
        return self._state.asleep

    @property
    def closing(self) -> bool:
        """Whether `close` was called: what fails from then on fails because of it."""
        return self._closing

    @property
    def under_way(self) -> int | None:
        """The number of the step that is being computed, None between steps."""
        return self._state.epoch + 1 if self._in_step else None

    def poke(self) -> None:
        """Work may have arrived for this rank's planner."""
        self._nudge.set()

    def wake(self, epoch: int) -> None:
        """Another rank of the domain starts step `epoch`; stale wakes are dropped by rule. InvalidRequest for one that cannot be."""
        if epoch > self._state.epoch + MOST_AHEAD:
            raise InvalidRequest(f"a wake for step {epoch}, which cannot have begun: this rank has finished {self._state.epoch}")
        if self._state.on_wake(epoch):
            self._nudge.set()

    def close(self) -> None:
        """Stop before the next step."""
        self._closing = True
        self._nudge.set()

    def fail(self, error: BatonError) -> None:
        """The rank cannot go on: `run` raises this error, also while a step is under way, whose outcome nobody will take in."""
        self._failure = self._failure or error
        self._failed.set()

    async def run(self) -> None:
        """Step until closed. Raises what a step raises, or what `fail` was told."""
        stepping, failing = asyncio.create_task(self._step_on()), asyncio.create_task(self._failed.wait())
        stepping.add_done_callback(lambda task: task.cancelled() or task.exception())  # also seen if the rank has failed before
        try:
            await asyncio.wait({stepping, failing}, return_when=asyncio.FIRST_COMPLETED)
            if self._failure:
                raise self._failure
            stepping.result()
        finally:
            stepping.cancel()
            failing.cancel()

    async def _step_on(self) -> None:
        """Waiting here needs no deadline: the wait is local, and `close` ends it."""
        while not self._closing:
            if not await self._turn():
                await self._nudge.wait()
            self._nudge.clear()

    async def _turn(self) -> bool:
        """One step, if this rank has work or must take part; False if it may sleep."""
        batch = self._planner.plan() if self._planner else None
        if self._state.asleep:
            if batch is None or not batch.num_tokens:
                self._tell()
                return False
            await self._wake_all()
        await self._run_step(batch)
        return True

    def _tell(self) -> None:
        if self._planner:
            self._planner.tell()

    async def _wake_all(self) -> None:
        epoch = self._state.want_wake()
        if epoch is not None:
            await self._wake_others(epoch)

    async def _run_step(self, batch: Batch | None) -> None:
        """Awaiting the step begins it; what this task does not do itself has its turn only then."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._in_step = True
        telling = loop.create_task(self._tell_during_step())
        try:
            outcome = await self._step(batch)
            await telling  # done long ago, unless it has failed
        finally:
            telling.cancel()
        self._in_step = False
        self.busy_s += loop.time() - began
        self.steps += not outcome.asleep
        if self._planner and batch is not None and batch.num_tokens:
            self._planner.apply(outcome.sampled)
        self._state.on_step(self._state.epoch + 1, outcome.asleep)

    async def _tell_during_step(self) -> None:
        """Not before it has begun: telling takes the interpreter, and maybe the core, that the step needs to begin."""
        if self._begun is not None:
            await self._begun()
        self._tell()
