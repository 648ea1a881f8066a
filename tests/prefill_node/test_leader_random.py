"""A prefill leader under any order of requests, accepts, pulls, cancels, steps and vanishing routers: no block is lost or rewritten.

The production desk, scheduler, lease table and Transfer service, on a seat without tensors; pulls are streams in memory.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from baton.config import PROTOCOL_VERSION, BatonConfig, RankPlan
from baton.engine.batch import Batch, Sampled
from baton.engine.runner import StepOutcome
from baton.request import Sampling, SequenceRequest
from baton.v1 import node_pb2, transfer_pb2
from kv_transfer.transport import Export
from prefill_node.leader import PrefillLeader
from ranks.facts import GroupHello
from ranks.session import Session

BLOCK = 4
TURNS = 12  # of the event loop, in which everything that can happen does


class Desktop:
    """A seat whose steps are taken by hand."""

    def __init__(self, num_blocks: int) -> None:
        config = BatonConfig.model_validate(
            {"model": "m", "block_size": 16, "prefill": {"max_step_tokens": 16, "max_sequences": 3, "max_unaccepted": 2, "max_waiting": 6}}
        ).model_copy(update={"block_size": BLOCK})
        self.plan = RankPlan(config=config, role="prefill", node="prefill-0", rank=0, threads=1)
        self.incarnation = b"i" * 16
        self.num_blocks = num_blocks
        self.max_model_len = 64
        self.vocab_size = 10
        self.block_bytes = 1
        self.control_address = "here:1"

    def step(self, batch: Batch | None) -> Awaitable[StepOutcome]:
        raise AssertionError("steps are taken by hand")

    def step_begun(self) -> Awaitable[None]:
        raise AssertionError("steps are taken by hand")

    def wake_others(self, epoch: int) -> Awaitable[None]:
        raise AssertionError("nobody else is there")

    def hello(self, transfer_address: str = "", exports: tuple[Export, ...] = ()) -> GroupHello:
        raise AssertionError("nobody asks")


class Puller:
    """One Pull on a stream of its own, from the reader's side. `blocks`: what it was told that it may read."""

    def __init__(self, leader: PrefillLeader, lease: int, attempt: int) -> None:
        self.lease, self.attempt = lease, attempt
        self.blocks: list[tuple[int, int]] = []
        self.complete = self.over = False
        self._said: asyncio.Queue[transfer_pb2.PullRequests | None] = asyncio.Queue()
        named = node_pb2.LeaseId(prefill_incarnation=b"i" * 16, number=lease)
        self._say(open=transfer_pb2.PullOpen(lease=named, attempt=attempt, protocol_version=PROTOCOL_VERSION))
        self.task = asyncio.create_task(leader.transfer.Pulls(self._requests(), self))  # type: ignore[arg-type]

    def _say(self, **what: object) -> None:
        self._said.put_nowait(transfer_pb2.PullRequests(requests=[transfer_pb2.PullRequest(pull=1, **what)]))

    async def _requests(self) -> AsyncIterator[transfer_pb2.PullRequests]:
        while (request := await self._said.get()) is not None:
            yield request

    async def write(self, message: transfer_pb2.PullReplies) -> None:
        """See grpc.aio.ServicerContext."""
        for reply in message.replies:
            self._hear(reply)

    def _hear(self, reply: transfer_pb2.PullReply) -> None:
        announced = reply.announcement
        self.blocks += zip(announced.block_ids, announced.generations, strict=True)
        self.complete |= reply.HasField("announcement") and announced.HasField("final")
        self.over |= reply.HasField("error") or reply.HasField("released")

    def release(self) -> None:
        """All is read: nothing is read from here on."""
        if self.complete and not self.over:
            self.blocks = []
            self._say(release=transfer_pb2.PullRelease(attempt=self.attempt))

    def leave(self, *, politely: bool) -> None:
        """Leave the pull and close the stream, or die."""
        self.blocks = []
        if politely:
            self._say(leave=transfer_pb2.PullLeave())
            self._said.put_nowait(None)
        else:
            self.task.cancel()


class World:
    """One leader, two routers that come and go, and pullers."""

    def __init__(self, num_blocks: int) -> None:
        self.leader = PrefillLeader(Desktop(num_blocks))
        self.routers = [self._router(0), self._router(1)]
        self.pullers: list[Puller] = []
        self.num_asked = 0
        self.batch: Batch | None = None

    def _router(self, which: int) -> Session:
        session = Session(bytes([which]) * 16)
        self.leader.desk.attach(session)
        return session

    def ask(self, which: int, prompt_len: int, short: bool) -> None:
        """Any of eight names; one request in four is one that nobody will pull."""
        self.num_asked += 1
        request = SequenceRequest(
            f"r{which}",
            self.num_asked,
            tuple((self.num_asked + i * i) % 10 for i in range(prompt_len)),
            Sampling(max_tokens=1 if short else 8),
        )
        self.leader.prefill(self.routers[which % 2], request, self.num_asked if prompt_len % 4 else 0, 60.0)

    def accept(self, which: int) -> None:
        self.leader.accept(self.lease(which))

    def pull(self, which: int, attempt: int) -> None:
        self.pullers.append(Puller(self.leader, self.lease(which), attempt))

    def lease(self, which: int) -> int:
        """A recent one, or the next to come."""
        return max(1, self.num_asked + 1 - which % 4)

    def puller(self, which: int, what: str) -> None:
        if self.pullers:
            puller = self.pullers[which % len(self.pullers)]
            puller.release() if what == "release" else puller.leave(politely=what == "leave")

    def cancel(self, which: int, attempt: int) -> None:
        self.leader.desk.cancel(self.routers[which % 2], f"r{which}", self.num_asked + 2 - attempt, "")

    def vanish(self, which: int) -> None:
        """A router is gone; it comes back as the same, on a stream of its own."""
        event("a router vanished")
        self.leader.desk.detach(self.routers[which % 2])
        self.routers[which % 2] = self._router(which % 2)

    async def half_steps(self, count: int) -> None:
        for _ in range(count):
            self.half_step()
            await self.settle()

    def half_step(self) -> None:
        """Plan, or apply what was planned: whatever else happens comes between."""
        if self.batch is None:
            batch = self.leader.plan()
            self.batch = batch if batch.num_tokens else None
            self.check_readers(set(batch.new_blocks.tolist()))
        else:
            count = len(self.batch.sample_rows)
            zeros = np.zeros(count, np.float32), np.zeros((count, 0), np.int64), np.zeros((count, 0), np.float32)
            self.batch = None
            self.leader.apply(Sampled(np.ones(count, np.int64), *zeros))

    def check_readers(self, rewritten: set[int]) -> None:
        """Nothing is written over what somebody may be reading."""
        for puller in self.pullers:
            for block, generation in puller.blocks:
                assert block not in rewritten and self.leader.pool.generation(block) == generation

    def check(self) -> None:
        self.leader.pool.check()
        self.check_readers(set())
        self.pullers = [puller for puller in self.pullers if not puller.task.done()]

    async def settle(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def end(self) -> None:
        """Everybody goes; then nothing is left."""
        for session in self.routers:
            self.leader.desk.detach(session)
        for puller in self.pullers:
            puller.leave(politely=False)
        await asyncio.gather(*(puller.task for puller in self.pullers), return_exceptions=True)
        if self.batch is not None:
            self.half_step()
        await self.settle()
        assert not len(self.leader.desk) and self.leader.scheduler.idle() and self.leader.pool.counts().idle()
        assert self.leader.transfer.num_pulls == 0
        await self.leader.close(None)
        assert self.leader.transfer.num_leases == 0


which = st.integers(0, 7)
ASK = st.tuples(st.just("ask"), which, st.integers(5, 24), st.sampled_from([False, False, False, True]))
PULL = st.tuples(st.just("pull"), which, st.integers(1, 4))
ACCEPT = st.tuples(st.just("accept"), which)
PULLER = st.tuples(st.just("puller"), which, st.sampled_from(["release", "leave", "die"]))
STEPS = st.tuples(st.just("half_steps"), st.integers(1, 8))
OPS = st.one_of(
    *(ASK, ASK, ASK, PULL, PULL, STEPS, STEPS, STEPS),
    *(ACCEPT, ACCEPT, PULLER, PULLER),
    st.tuples(st.just("cancel"), which, st.integers(0, 4)),
    st.tuples(st.just("vanish"), which),
)


@given(st.integers(7, 12), st.lists(OPS, min_size=40, max_size=100))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_block_is_lost_or_rewritten_whatever_happens_in_whatever_order(num_blocks: int, ops: list[Any]) -> None:
    async def play() -> None:
        world = World(num_blocks)
        for name, *arguments in ops:
            waiting = getattr(world, name)(*arguments)
            if waiting is not None:
                await waiting
            await world.settle()
            world.check()
        await world.end()

    asyncio.run(play())


def test_the_pieces_of_the_play_do_what_they_say() -> None:
    """Else the test above might prove nothing: a request is computed, pulled and released."""

    async def play() -> None:
        world = World(8)
        world.ask(0, 10, False)
        world.pull(1, 1)
        for _ in range(3):
            world.half_step()
            await world.settle()
        (puller,) = world.pullers
        assert puller.complete and len(puller.blocks) == 3
        puller.release()
        await world.settle()
        assert puller.over and world.leader.pool.counts().idle()
        await world.end()

    asyncio.run(play())
