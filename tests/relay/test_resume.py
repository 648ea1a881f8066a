"""Answers under failures equal undisturbed ones, tokens and logprobs: the router over a real prefill rank and two real decode ranks.

In this process, over real gRPC and TCP, in fp32. What is disturbed is always under way: some tokens are out, others are to come.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from baton.config import BatonConfig, MembershipConfig
from baton.request import Chunk, GenerateRequest, Prompt, SamplingAsked, TokenLogprob, Usage
from baton.tokenizer import Tokenizer
from router.dispatch import Dispatcher
from router.group import Group
from tests.relay.inprocess import InProcess, eventually
from tests.router.echo_tokenizer import save_tokenizer
from tests.tiny_models import make_tiny

NUM_BLOCKS = 64
NUM_TOKENS = 120
PROMPT = tuple(4 + (i * i * 7) % 200 for i in range(70))
HOW = SamplingAsked(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
GREEDY, SEEDED = replace(HOW, temperature=0.0), replace(HOW, temperature=0.9, top_p=0.9, seed=7)
Disturbance = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got. Logprobs are rounded: blocks that are cached are computed in other batches."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    usage: Usage
    served_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A router and its ranks."""

    dispatcher: Dispatcher
    prefill: InProcess
    decodes: tuple[InProcess, InProcess]

    def group(self, node: InProcess) -> Group:
        """A rank as the router sees it."""
        found = self.dispatcher.fleet.registry.get(node.host.address.control)
        assert found is not None
        return found

    def busy(self) -> InProcess:
        """The decode rank that has the one request under way."""
        return next(decode for decode in self.decodes if len(decode.leader.desk))

    async def ask(self, sampling: SamplingAsked, disturb: Disturbance | None = None, after: int = 20) -> Answer:
        """An answer during which, after some tokens, something happens."""
        chunks: list[Chunk] = []
        request = GenerateRequest(Prompt(token_ids=PROMPT), sampling, timeout_s=60.0)
        async with aclosing(self.dispatcher.generate(request)) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                if disturb is not None and sum(len(known.token_ids) for known in chunks) >= after:
                    await disturb()
                    disturb = None
        assert disturb is None
        usage = chunks[-1].usage
        assert usage is not None
        ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        return Answer(ids, [item for chunk in chunks for item in chunk.logprobs], usage, chunks[-1].served_by)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    model = make_tiny("llama", tmp_path)
    save_tokenizer(tmp_path)
    async with AsyncExitStack() as stack:
        config = BatonConfig(model=str(model), served_model_name="tiny", membership=MembershipConfig(beat_s=0.3, dead_beats=40))
        dispatcher = Dispatcher(config, Tokenizer.load(tmp_path))
        stack.push_async_callback(dispatcher.close)
        dispatcher.start()
        ranks = [await _started(stack, model, *which) for which in (("prefill", 0), ("decode", 0), ("decode", 1))]
        for rank in ranks:
            dispatcher.add_group(rank.role, rank.host.address.control)
        await eventually(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "all proofs")
        yield Cluster(dispatcher, ranks[0], (ranks[1], ranks[2]))


async def _started(stack: AsyncExitStack, model: Path, role: str, number: int) -> InProcess:
    rank = InProcess(model, role, NUM_BLOCKS, number=number, transfer={"transport": "tcp"})
    stack.push_async_callback(rank.stop)
    return await rank.start()


def same(got: Answer, expected: Answer) -> None:
    """Every token, with the logprobs it had, and counted as it was."""
    assert got.token_ids == expected.token_ids
    assert [item.token_id for item in got.logprobs] == got.token_ids
    assert [item.logprob for item in got.logprobs] == pytest.approx([item.logprob for item in expected.logprobs], abs=1e-4)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(PROMPT), NUM_TOKENS)


async def test_whoever_leaves_an_answer_goes_on_as_if_nobody_had(cluster: Cluster) -> None:
    expected = {sampling: await cluster.ask(sampling) for sampling in (GREEDY, SEEDED)}
    assert expected[GREEDY].token_ids != expected[SEEDED].token_ids

    async def hand_over() -> None:
        assert cluster.dispatcher.fleet.hand_over([cluster.group(cluster.busy())]) == 1

    async def lose_decode() -> None:
        await cluster.busy().stop()

    async def lose_prefill() -> None:
        await cluster.prefill.stop()

    for sampling, disturb in ((GREEDY, hand_over), (SEEDED, hand_over), (SEEDED, lose_decode)):
        answer = await cluster.ask(sampling, disturb)
        same(answer, expected[sampling])
        assert set(answer.served_by) == {"prefill-0", "decode-0/0", "decode-1/0"}
    same(await cluster.ask(GREEDY, lose_prefill, after=2), expected[GREEDY])
    for sampling in (GREEDY, SEEDED):
        alone = await cluster.ask(sampling)
        same(alone, expected[sampling])
        assert len(alone.served_by) == 1, "there is no prefill node left, and one decode node"
    last = next(decode for decode in cluster.decodes if cluster.group(decode).ready)
    await eventually(lambda: last.idle, "all blocks to be free or cached")
