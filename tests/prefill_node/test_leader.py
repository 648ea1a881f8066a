"""A prefill leader over a real engine and real gRPC: what becomes of leases and pulls when routers and readers come and go."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from baton.deadline import Deadline
from baton.errors import LeaseLost
from kv_transfer.client import Pull, PullClient
from tests.relay.inprocess import InProcess, ask, eventually
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def prefill(model: Path) -> AsyncIterator[InProcess]:
    rank = await InProcess(model, "prefill", 12, max_model_len=192, transfer={"transport": "tcp"}).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle node")
    await rank.stop()


@pytest.fixture
async def client() -> AsyncIterator[PullClient]:
    made = PullClient()
    yield made
    await made.close()


@pytest.fixture
def pull(prefill: InProcess, client: PullClient) -> Callable[..., Pull]:
    def make(lease: int, attempt: int = 1) -> Pull:
        address = prefill.host.address
        return client.pull(address.control, prefill.host.incarnation, lease, attempt, 0, Deadline.after(10))

    return make


async def test_a_prompt_computed_again_after_a_revocation_is_announced(prefill: InProcess, pull: Callable[..., Pull]) -> None:
    router = await prefill.stream()
    await router.prefill(ask("unwanted", 100), 1)
    await eventually(lambda: 0 in router.ids("unwanted"), "the first token")
    await router.prefill(ask("wanted", 160, seed=5), 2)
    await router.accept(2)
    await eventually(lambda: 0 in router.ids("wanted"), "room for the wanted one")
    async with pull(2) as reading:
        assert sum([len(part.block_ids) async for part in reading]) == 10
        await reading.release()
    await router.accept(1)
    async with pull(1) as reading:
        parts = [part async for part in reading]
        assert sum(len(part.block_ids) for part in parts) == 7
        assert parts[-1].final is not None and parts[-1].final.token_id == router.ids("unwanted")[0]
        await reading.release()
    assert not router.errors


async def test_a_pull_that_fenced_another_and_left_lets_the_lease_go_with_the_request(
    prefill: InProcess, pull: Callable[..., Pull]
) -> None:
    router = await prefill.stream()
    prefill.host.pause()
    await router.prefill(ask("a", 20, max_tokens=1), 1)
    await eventually(lambda: prefill.host.in_step, "a step")
    async with pull(1, 1), pull(1, 2):
        pass
    await eventually(lambda: not prefill.leader.transfer.num_pulls, "the end of both pulls")
    prefill.host.resume()
    await eventually(lambda: router.finished("a"), "the only token")
    await eventually(lambda: prefill.idle, "nobody to read means nothing to keep")


async def test_blocks_stay_while_a_fenced_reader_has_not_left(prefill: InProcess, pull: Callable[..., Pull]) -> None:
    router = await prefill.stream()
    prefill.host.pause()
    await router.prefill(ask("a", 20, max_tokens=1), 1)
    async with pull(1, 1):
        async with pull(1, 2):
            prefill.host.resume()
            await eventually(lambda: router.finished("a"), "the only token")
        await eventually(lambda: prefill.leader.transfer.num_pulls == 1, "the end of the higher pull")
        assert prefill.life.counts().held == 2


async def test_a_reader_that_leaves_after_the_only_token_ends_the_request_at_once(prefill: InProcess, pull: Callable[..., Pull]) -> None:
    router = await prefill.stream()
    await router.prefill(ask("a", 20), 7)  # keeps the lease numbers apart
    prefill.host.pause()
    await router.prefill(ask("b", 20, max_tokens=1), 1)
    async with pull(1) as reading:
        prefill.host.resume()
        assert [part.final is not None async for part in reading][-1]
    await eventually(lambda: len(prefill.leader.desk) == 1, "no entry of the request")
    with pytest.raises(LeaseLost):
        async with pull(1, 2):
            raise AssertionError("its blocks are somebody else's")
    await router.cancel("a")


async def test_a_router_that_breaks_off_during_a_step_leaves_nothing(prefill: InProcess, pull: Callable[..., Pull]) -> None:
    router = await prefill.stream()
    prefill.host.pause()
    await router.prefill(ask("a", 100), 1)
    await eventually(lambda: prefill.host.in_step, "a step")
    async with pull(1) as reading:
        await router.close()
        with pytest.raises(LeaseLost):
            await anext(reading)
        prefill.host.resume()
    await eventually(lambda: prefill.idle, "an idle node")


async def test_a_deadline_during_the_step_is_told_once(prefill: InProcess) -> None:
    router = await prefill.stream()
    prefill.host.pause()
    await router.prefill(ask("a", 100), 1, time_left_s=0.05)
    await eventually(lambda: ("a", 1) in router.errors, "the deadline")
    prefill.host.resume()
    await eventually(lambda: prefill.idle, "an idle node")
    assert not router.tokens and router.errors["a", 1].error.cause == "deadline"


async def test_a_node_that_closes_ends_its_streams_and_takes_nothing_more(prefill: InProcess) -> None:
    router = await prefill.stream()
    prefill.host.pause()
    await router.prefill(ask("a", 100), 1)
    await eventually(lambda: prefill.host.in_step, "a step")
    await prefill.node.close(None)
    await eventually(lambda: router.ended, "the end of the stream")
    assert router.errors["a", 1].error.cause == "node_lost"
    prefill.host.resume()
