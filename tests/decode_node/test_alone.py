"""A decode rank without any prefill node: it computes prompts itself, beside those that run, and says what transformers says (fp32)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from baton.request import Sampling, SequenceRequest
from tests.relay.inprocess import PATIENCE_S, InProcess, Stream, ask, eventually
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

MAX_TOKENS = 12


@pytest.fixture(scope="module", params=["llama", "deepseek_v2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture
async def decode(model: Path) -> AsyncIterator[InProcess]:
    """Chunks of 16 tokens, so that prompts take several steps."""
    rank = await InProcess(model, "decode", 40, max_model_len=192, decode={"max_step_tokens": 16}).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle decode node")
    await rank.stop()


def tokens(stream: Stream, name: str) -> list[int]:
    ids = stream.ids(name)
    assert sorted(ids) == list(range(min(ids), min(ids) + len(ids)))
    return [ids[index] for index in sorted(ids)]


async def test_prompts_are_computed_beside_those_that_run(decode: InProcess, oracle: Oracle) -> None:
    """Several at once, of which some share a prefix; each equals what it would have been alone and undisturbed."""
    stream = await decode.stream()
    requests = [ask(f"r{i}", length, seed=i % 3, max_tokens=MAX_TOKENS) for i, length in enumerate((70, 5, 33, 90, 16, 1))]
    for request in requests:
        await stream.decode_alone(request)
        await asyncio.sleep(0.02)
    await eventually(lambda: all(stream.finished(request.request_id) for request in requests), "all answers")
    for request in requests:
        assert tokens(stream, request.request_id) == oracle.greedy(list(request.prompt_ids), MAX_TOKENS).token_ids
    assert not stream.errors and not stream.accepted, "nobody waits to be told that there is room"
    firsts = {event.request_id: event for event in stream.tokens if event.output_index == 0}
    assert all(event.cached_tokens is not None for event in firsts.values())
    assert all(event.cached_tokens is None for event in stream.tokens if event.output_index)


async def test_a_sequence_goes_on_from_what_was_emitted(decode: InProcess, oracle: Oracle) -> None:
    """As after the death of the node that generated it: the next token is the right one, and what is cached is not computed again."""
    stream = await decode.stream()
    whole = ask("whole", 50, max_tokens=MAX_TOKENS)
    expected = oracle.greedy(list(whole.prompt_ids), MAX_TOKENS).token_ids
    await stream.decode_alone(whole)
    await eventually(lambda: stream.finished("whole"), "the answer")
    rest = SequenceRequest("rest", 4, whole.prompt_ids, whole.sampling, tuple(expected[:5]))
    await stream.decode_alone(rest)
    await eventually(lambda: stream.finished("rest"), "the rest of it")
    assert (tokens(stream, "whole"), tokens(stream, "rest")) == (expected, expected[5:])
    first = next(event for event in stream.tokens if event.request_id == "rest")
    assert (first.output_index, first.attempt, first.cached_tokens) == (5, 4, 48)


async def test_seeded_draws_and_log_probabilities_are_those_of_an_undisturbed_run(decode: InProcess) -> None:
    stream = await decode.stream()
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.9, top_k=40, seed=7, num_logprobs=2)
    prompt = ask("", 40).prompt_ids
    await stream.decode_alone(SequenceRequest("whole", 1, prompt, sampling))
    await eventually(lambda: stream.finished("whole"), "the answer")
    expected = tokens(stream, "whole")
    await stream.decode_alone(SequenceRequest("rest", 2, prompt, sampling, tuple(expected[:6])))
    await eventually(lambda: stream.finished("rest"), "the rest of it")
    assert tokens(stream, "rest") == expected[6:]
    logprobs = {name: [e.logprobs[0] for e in stream.tokens if e.request_id == name] for name in ("whole", "rest")}
    assert all(len(logprob.top) == 2 for logprob in logprobs["whole"])
    for one, other in zip(logprobs["whole"][6:], logprobs["rest"], strict=True):
        assert one.token_id == other.token_id and abs(one.logprob - other.logprob) < 1e-5


async def test_cancelled_while_its_prompt_is_computed_it_leaves_nothing(decode: InProcess) -> None:
    stream = await decode.stream()
    decode.host.pause()
    await stream.decode_alone(ask("a", 60))
    await eventually(lambda: decode.host.in_step, "a step")
    await stream.cancel("a")
    await eventually(lambda: len(decode.leader.desk) == 0, "the cancel")
    decode.host.resume()
    await eventually(lambda: decode.idle, "an idle node")
    assert not stream.tokens and not stream.errors


async def test_what_was_suspended_goes_on_where_it_was(model: Path, oracle: Oracle) -> None:
    """Three answers of five blocks in a pool of seven: none fails, and each says what it would have said undisturbed."""
    decode = await InProcess(model, "decode", 7, max_model_len=96, decode={"reserve_output_tokens": 1}).start()
    stream = await decode.stream()
    requests = {f"r{i}": ask(f"r{i}", 20, seed=i, max_tokens=60) for i in range(3)}
    for request in requests.values():
        await stream.decode_alone(request)
    resumed: set[tuple[str, int]] = set()

    async def resume() -> None:
        for key in stream.errors.keys() - resumed:
            assert stream.errors[key].error.cause == "suspended" and stream.errors[key].error.retryable
            resumed.add(key)
            old = requests[key[0]]
            emitted = tuple(tokens(stream, key[0])) if stream.ids(key[0]) else ()
            await stream.decode_alone(SequenceRequest(key[0], key[1] + 1, old.prompt_ids, old.sampling, emitted))

    async with asyncio.timeout(PATIENCE_S):
        while not all(stream.finished(name) for name in requests):
            await resume()
            await asyncio.sleep(0.005)
    for name, request in requests.items():
        assert tokens(stream, name) == oracle.greedy(list(request.prompt_ids), 60).token_ids
    assert resumed, "the pool was too large for this test"
    await eventually(lambda: decode.idle, "an idle decode node")
    await decode.stop()


async def test_nothing_is_overcommitted_where_the_operator_says_so(model: Path) -> None:
    settings = {"overcommit": "none", "reserve_output_tokens": 1}
    decode = await InProcess(model, "decode", 40, max_model_len=192, decode=settings).start()
    stream = await decode.stream()
    decode.host.pause()
    await stream.decode_alone(ask("a", 10, max_tokens=100))
    await eventually(lambda: decode.host.in_step, "a step")
    assert decode.leader.pool.available() == decode.leader.pool.num_blocks - 7
    await stream.cancel("a")
    await decode.stop()
