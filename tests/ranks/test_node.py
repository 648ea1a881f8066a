"""A rank's beginning and end: nobody is served too early, and a rank that has failed ends, whatever it is stuck in."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import BatonConfig, MembershipConfig, RankPlan
from baton.engine.batch import Batch
from baton.engine.runner import StepOutcome
from baton.errors import BatonError, NodeLost
from baton.rpc import open_channel
from ranks.drive import Drive
from ranks.facts import RankCounts
from ranks.host import RankHost
from ranks.node import RankLife
from tests.relay.inprocess import InProcess, eventually
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parent.parent.parent


class Stepping:
    """A role that only steps: it was woken, and its one step ends when told, with an error. close_error: what closing raises."""

    def __init__(self, host: RankHost, close_error: Exception | None = None) -> None:
        self._host = host
        self._close_error = close_error
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.may_close = asyncio.Event()
        self.may_close.set()
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
        await self.may_open.wait()

    def counts(self) -> RankCounts:
        """See Role."""
        return self._host.counts(0, True)

    async def close(self, error: BatonError | None) -> None:
        """See Role."""
        self.told.append(error)
        await self._until_reads_have_ended()
        if self._close_error:
            raise self._close_error

    async def _until_reads_have_ended(self) -> None:
        """As decode's pulls do it: no cancel ends this."""
        while not self.may_close.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.may_close.wait()


async def prepare(tmp_path: Path, close_error: Exception | None = None, **membership: float) -> tuple[RankLife, Stepping]:
    config = BatonConfig(model=str(tmp_path), membership=MembershipConfig(**membership))
    host = RankHost(RankPlan(config=config, role="prefill", node="prefill-0", rank=0, threads=1))
    await host.prepare()
    return RankLife(host), Stepping(host, close_error)


async def start(tmp_path: Path, close_error: Exception | None = None, **membership: float) -> tuple[RankLife, Stepping]:
    life, role = await prepare(tmp_path, close_error, **membership)
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


async def test_nobody_is_served_before_the_role_is_open(tmp_path: Path) -> None:
    life, role = await prepare(tmp_path)
    role.may_open.clear()
    starting = asyncio.create_task(life.start(lambda _: role))
    async with open_channel(life.host.address.control) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await health.Check(health_pb2.HealthCheckRequest(), timeout=0.2, wait_for_ready=True)
        role.may_open.set()
        await starting
        await health.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
    role.left.set()
    await life.stop()


async def test_a_step_that_takes_too_long_fails_the_rank_while_it_is_still_under_way(tmp_path: Path) -> None:
    life, role = await start(tmp_path, beat_s=0.05, stall_s=0.2)
    await eventually(life.failed.is_set, "the verdict")
    assert isinstance(role.told[0], NodeLost) and "step 1 of rank prefill-0/0" in role.told[0].message
    await life.stop()


async def test_a_role_that_waits_for_reads_does_not_keep_a_failed_rank(tmp_path: Path) -> None:
    life, role = await start(tmp_path)
    role.may_close.clear()
    role.drive.fail(NodeLost("a read was not acknowledged"))
    await eventually(life.failed.is_set, "the verdict")
    assert role.told
    role.may_close.set()
    await life.stop()


def test_the_process_of_a_failed_rank_ends_although_its_step_is_stuck_in_native_code(tmp_path: Path) -> None:
    """No rank can be rebuilt beside one that does not die: neither a thread nor a close may wait for the step."""
    program = f"""if True:
        import asyncio, ctypes
        from pathlib import Path
        from baton.engine.runner import StepOutcome
        from baton.errors import NodeLost
        from tests.ranks.test_node import Stepping, prepare

        class Stuck(Stepping):
            async def _step(self, batch):
                self.in_step.set()
                return await self._host._step_thread.run(ctypes.CDLL(None).pause)

        async def main():
            life, _ = await prepare(Path({str(tmp_path)!r}))
            role = Stuck(life.host)
            await life.start(lambda _: role)
            await role.in_step.wait()
            role.drive.fail(NodeLost("stuck"))
            await life.failed.wait()
            print("failed as it should")
        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "failed as it should"), done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_rank_whose_transfer_thread_has_failed_is_rebuilt(tmp_path: Path, role: str) -> None:
    """It would answer pings and beat for ever, and fail every pull."""
    rank = await InProcess(make_tiny("llama", tmp_path), role, 8, max_model_len=64).start()
    rank.transfers.post(lambda: 1 // 0)
    await eventually(rank.life.failed.is_set, "the failure of the rank")
    assert "transfer thread" in rank.life.failure
    await rank.stop()
