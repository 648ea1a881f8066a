"""A prefill leader over a real engine and real gRPC: what becomes of leases and pulls when routers and readers come and go."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch

from baton.deadline import Deadline
from baton.errors import LeaseLost
from baton.v1 import node_pb2
from kv_transfer.client import Pull, PullClient, export_of
from kv_transfer.lease import Announced
from kv_transfer.reader import Reader
from kv_transfer.thread import TransferThread
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


@asynccontextmanager
async def node(model: Path, **settings: object) -> AsyncIterator[InProcess]:
    """A prefill node with other settings, which is idle in the end."""
    rank = await InProcess(model, "prefill", 12, max_model_len=192, **settings).start()
    try:
        yield rank
        await eventually(lambda: rank.idle, "an idle node")
        rank.leader.pool.check()
    finally:
        await rank.stop()


def pull_from(rank: InProcess, client: PullClient, lease: int, attempt: int = 1) -> Pull:
    return client.pull(rank.host.address.control, rank.host.incarnation, lease, attempt, 0, Deadline.after(10))


async def test_leases_of_a_router_that_fell_silent_are_revoked_at_every_stage(model: Path, client: PullClient) -> None:
    """One is being pulled, one is held, one is computed, one waits. Blocks under a read come back when that has ended, not before."""
    async with node(model, membership={"beat_s": 0.1, "router_gone_s": 1.5}) as prefill:
        router = await prefill.stream()
        for lease in (1, 2):
            await router.prefill(ask(f"held{lease}", 20, seed=lease), lease)
            await eventually(lambda lease=lease: 0 in router.ids(f"held{lease}"), "a first token")
        async with pull_from(prefill, client, 1) as reading:
            prefill.host.pause()
            await router.prefill(ask("computed", 20, seed=3), 3)
            await eventually(lambda: prefill.host.in_step, "a step")
            await router.prefill(ask("waiting", 20, seed=4), 4)
            await eventually(lambda: len(prefill.leader.desk) == 4, "all four")
            router.mute = True
            await eventually(lambda: router.ended, "the end of the stream")
            assert "said nothing" in router.status
            with pytest.raises(LeaseLost, match="stream is gone"):
                assert [part async for part in reading]
                await reading.release()
            assert prefill.life.counts().held == 4, "what is read, and what is written"
            prefill.host.resume()
            await eventually(lambda: prefill.life.counts().held == 2, "the end of the step")
        await eventually(lambda: prefill.idle, "the end of the pull")


async def test_blocks_of_a_reader_that_was_stopped_come_back_and_a_late_read_of_it_fails(model: Path, client: PullClient) -> None:
    """Half-open: it neither reads nor leaves. The lease ends by its deadline, the link soon after, and generations do the rest."""
    async with node(model, transfer={"transport": "tcp", "lease_s": 0.3, "read_s": 0.2}) as prefill, AsyncExitStack() as stack:
        router = await prefill.stream()
        await router.prefill(ask("a", 100), 1)
        stopped = await stack.enter_async_context(pull_from(prefill, client, 1))
        announced = [part async for part in stopped]
        assert prefill.leader.transfer.num_pulls == 1
        await eventually(lambda: ("a", 1) in router.errors, "the end of the lease")
        await eventually(lambda: prefill.idle, "all blocks")
        assert router.errors["a", 1].error.cause == "lease_lost"
        await router.prefill(ask("b", 160, seed=5, max_tokens=1), 0)
        await eventually(lambda: router.finished("b"), "somebody else's content in the blocks")
        assert router.hello
        with pytest.raises(LeaseLost):
            await late_read(router.hello, announced)


async def late_read(source: node_pb2.NodeHello, announced: list[Announced]) -> int:
    """Read, over the real transport, what was announced long ago."""
    export = export_of(source.exports[0])
    thread = TransferThread()
    try:
        reader = Reader(thread, memoryview(bytearray(export.layout.nbytes)), export.layout, transport="tcp")
        await asyncio.to_thread(reader.connect, source.incarnation, [export], Deadline.after(10))
        blocks = [block for part in announced for block in part.block_ids]
        generations = [generation for part in announced for generation in part.generations]
        ticket = reader.read(source.incarnation, blocks, generations, range(len(blocks)), Deadline.after(10))
        return await asyncio.wrap_future(ticket.future)
    finally:
        thread.close()


async def test_an_attempt_is_known_until_it_has_failed(prefill: InProcess, pull: Callable[..., Pull]) -> None:
    """Also when its part is over, because decode has all it needs: that is no reason to start again."""
    router = await prefill.stream()
    prefill.host.pause()
    await router.prefill(ask("a", 20), 1)
    await router.check("a")
    await eventually(lambda: router.known == [("a", 1, 0)], "an answer")
    prefill.host.resume()
    await eventually(lambda: 0 in router.ids("a"), "the first token")
    async with pull(1) as reading:
        assert [part async for part in reading]
        await router.check("a")
        await reading.release()
    await eventually(lambda: not len(prefill.leader.desk), "the end of the lease")
    await router.check("a")
    await eventually(lambda: router.known[1:] == [("a", 1, 1)] * 2, "two more answers")
    await router.cancel("b")
    await router.prefill(ask("b", 20), 2)
    await router.check("b")
    await eventually(lambda: ("b", 1) in router.errors, "the word that it was cancelled before it came")
    await eventually(lambda: prefill.idle, "nothing of it")


async def test_a_refused_request_tells_whoever_waits_for_its_lease(model: Path, client: PullClient) -> None:
    async with node(model, prefill={"max_sequences": 1, "max_waiting": 0}) as prefill:
        router = await prefill.stream()
        prefill.host.pause()
        await router.prefill(ask("a", 20), 1)
        await eventually(lambda: prefill.host.in_step, "a step")
        async with pull_from(prefill, client, 2) as reading:
            await router.prefill(ask("b", 20), 2)
            with pytest.raises(LeaseLost, match="at most 1 may"):
                await anext(reading)
        await eventually(lambda: ("b", 1) in router.errors, "the refusal")
        await router.cancel("a")
        prefill.host.resume()


HOSTILE = {
    "seed": {"seed": 2**64 - 1},
    "stop ids": {"stop_token_ids": [2**32 - 1, 0, 0], "min_tokens": 8},
    "known stop ids": {"stop_token_ids": list(range(4096)), "min_tokens": 8},
    "top_k": {"top_k": 2**31 - 1},
    "logprobs": {"num_logprobs": 64},
    "too many logprobs": {"num_logprobs": 2**32 - 1},
    "cold": {"temperature": 1e-45, "top_p": 0.0, "min_p": 1.0},
    "hot": {"temperature": 3e38, "top_p": 1e-30},
    "infinite": {"temperature": math.inf},
    "negative": {"top_p": -1.0},
    "no tokens": {"max_tokens": 0},
    "all tokens": {"max_tokens": 2**32 - 1},
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_whatever_a_router_asks_for_its_attempt_ends_and_the_node_goes_on(prefill: InProcess, name: str) -> None:
    """Refused, or computed: values that the engine could not work with would end the rank, and everybody's sequences."""
    router = await prefill.stream()
    sampling = node_pb2.ResolvedSampling(**{"max_tokens": 8, "temperature": 1.0, "top_p": 1.0, **HOSTILE[name]})
    asked = node_pb2.SequenceRequest(request_id="x", attempt=1, prompt_ids=[5, 6, 7], sampling=sampling, time_left_s=60.0)
    await router.say(prefill=node_pb2.PrefillRequest(sequence=asked))
    await eventually(lambda: bool(router.ids("x")) or ("x", 1) in router.errors, "an answer")
    await router.prefill(ask("sound", 20, max_tokens=1), 0)
    await eventually(lambda: router.finished("sound"), "another's token")
    assert not prefill.life.failed.is_set()


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
