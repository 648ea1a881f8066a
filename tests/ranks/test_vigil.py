"""A rank's watch over its domain, over real gRPC: who falls silent is found out and named, who is loading is not judged."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NoReturn

import pytest

from baton.config import MembershipConfig
from baton.deadline import Deadline
from baton.engine.batch import Batch
from baton.engine.runner import StepOutcome
from baton.errors import BatonError, DeadlineExceeded, InternalError, InvalidRequest, NodeLost
from baton.rpc import bind, make_server
from baton.v1 import rank_pb2_grpc
from kv_transfer.transport import Export
from ranks.drive import Drive
from ranks.facts import ReadOrder
from ranks.service import Peer, RankService
from ranks.vigil import Vigil
from tests.relay.inprocess import eventually

FAST = MembershipConfig(beat_s=0.2, suspect_beats=2, dead_beats=4, stall_s=0.6)


class Rank:
    """A rank that steps when woken; the step ends when it may. Answers pings through the real service until it is `stopped`."""

    def __init__(self) -> None:
        self.may_step = asyncio.Event()
        self.drive = Drive(self._step, self._wake, None)

    async def _step(self, batch: Batch | None) -> StepOutcome:
        await self.may_step.wait()
        raise NodeLost("the step is over")

    async def _wake(self, epoch: int) -> None:
        """Nobody to wake."""

    def wake(self, epoch: int) -> None:
        """See RankSide."""
        self.drive.wake(epoch)

    async def take_sources(self, incarnation: bytes, exports: Sequence[Export]) -> NoReturn:
        """See RankSide."""
        raise InvalidRequest("no")

    async def read(self, order: ReadOrder, deadline: Deadline) -> NoReturn:
        """See RankSide."""
        raise InvalidRequest("no")

    def export(self) -> NoReturn:
        """See RankSide."""
        raise InvalidRequest("no")


class Stoppable(RankService):
    """The service of a rank whose event loop can be stopped, as SIGSTOP would."""

    def __init__(self, side: Rank) -> None:
        super().__init__(side)
        self.going = asyncio.Event()
        self.going.set()
        self.pings = 0

    async def Ping(self, request: Any, context: Any) -> Any:
        """See proto."""
        self.pings += 1
        await self.going.wait()
        return await super().Ping(request, context)


@asynccontextmanager
async def serving(service: RankService) -> AsyncIterator[str]:
    """The address that the service listens on."""
    server = make_server()
    rank_pb2_grpc.add_RankControlServicer_to_server(service, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@asynccontextmanager
async def watched(rank: Rank, *addresses: str) -> AsyncIterator[asyncio.Task[None]]:
    """A leader with these other ranks, stepping under a vigil; the task of its drive."""
    peers = [Peer("node-0", number, address) for number, address in enumerate(addresses, 1)]
    running = asyncio.create_task(rank.drive.run())
    watching = asyncio.create_task(Vigil("node-0/0", rank.drive, peers, FAST).run())
    yield running
    watching.cancel()
    rank.drive.close()
    rank.may_step.set()
    await asyncio.wait([running, watching])
    assert running.done() and (watching.cancelled() or watching.exception() is None)
    for peer in peers:
        await peer.close()


async def failure_of(running: asyncio.Task[None]) -> BatonError:
    """What the drive was failed with."""
    await eventually(running.done, "the verdict")
    error = running.exception()
    assert isinstance(error, NodeLost)
    return error


async def test_a_rank_that_answers_a_ping_says_how_far_it_is() -> None:
    rank = Rank()
    rank.drive.steps = 7
    async with serving(RankService(rank)) as address:
        peer = Peer("node-0", 1, address)
        assert await peer.ping(5.0) == 7
        await peer.close()


async def test_a_ping_has_a_deadline() -> None:
    service = Stoppable(Rank())
    service.going.clear()
    async with serving(service) as address:
        peer = Peer("node-0", 1, address)
        with pytest.raises(DeadlineExceeded):
            await peer.ping(0.05)
        await peer.close()


async def test_a_rank_that_is_stopped_is_found_out_and_named() -> None:
    stopped, well = Stoppable(Rank()), Stoppable(Rank())
    leader = Rank()
    async with serving(well) as one, serving(stopped) as two, watched(leader, one, two) as running:
        await eventually(lambda: stopped.pings > 2 and well.pings > 2, "some beats")
        assert not running.done()
        stopped.going.clear()
        error = await failure_of(running)
        assert "node-0/2 has not answered for 0.8 s" in error.message and error.cause == "rank_silent"


async def test_a_rank_that_is_gone_is_found_out() -> None:
    service, leader = Stoppable(Rank()), Rank()
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving(service))
        async with watched(leader, address) as running:
            await eventually(lambda: service.pings > 2, "some beats")
            await stack.aclose()
            assert "node-0/1" in (await failure_of(running)).message


async def test_a_rank_that_is_still_loading_is_waited_for() -> None:
    """Its port is bound, and nobody answers there yet; once it has come up it is judged as any other."""
    leader, service = Rank(), Stoppable(Rank())
    server = make_server()
    rank_pb2_grpc.add_RankControlServicer_to_server(service, server)
    port = bind(server, "127.0.0.1", 0)
    async with watched(leader, f"127.0.0.1:{port}") as running:
        await asyncio.sleep(1.5 * FAST.dead_s)
        assert not running.done()
        await server.start()
        await eventually(lambda: service.pings > 2, "some beats")
        service.going.clear()
        await failure_of(running)
    service.going.set()
    await server.stop(None)


async def test_a_step_that_does_not_end_fails_its_rank_although_it_answers() -> None:
    rank = Rank()
    async with watched(rank) as running:
        rank.wake(1)
        error = await failure_of(running)
        assert "step 1 of rank node-0/0 is not done after 0.6 s" in error.message and error.cause == "step_stalled"


class Odd:
    """A peer in which a bug shows."""

    name = "node-0/1"

    async def ping(self, timeout_s: float) -> int:
        raise ZeroDivisionError("a bug")


async def test_a_vigil_that_fails_fails_its_rank() -> None:
    rank = Rank()
    running = asyncio.create_task(rank.drive.run())
    await Vigil("node-0/0", rank.drive, [Odd()], FAST).run()
    with pytest.raises(InternalError, match="a bug"):
        await running


async def test_a_rank_that_sleeps_is_not_stalled() -> None:
    async with watched(Rank()) as running:
        await asyncio.sleep(2 * FAST.stall_s)
        assert not running.done()
