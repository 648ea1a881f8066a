"""Sources that lie, fall silent or go away, over real gRPC: the sequence is sent back to the router, or goes on; no block is lost.

The decode rank is real; the source is a Transfer service that says what a test tells it, about blocks of a real pool.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import torch

from baton.v1 import node_pb2
from tests.decode_node.scripted_source import QUEUED, RELEASED, Reply, ScriptedSource, announcement, final
from tests.relay.inprocess import InProcess, Stream, ask, eventually
from tests.tiny_models import VOCAB, make_tiny

SETTINGS = {"max_model_len": 192, "transfer": {"transport": "tcp", "handshake_s": 0.5}}
PROMPT_LEN = 50  # four blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def decode(model: Path) -> AsyncIterator[InProcess]:
    rank = await InProcess(model, "decode", 12, **SETTINGS).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle decode node")
    await rank.stop()


@pytest.fixture
async def source() -> AsyncIterator[tuple[ScriptedSource, str]]:
    servicer = ScriptedSource()
    yield servicer, await servicer.start()
    await servicer.stop()


@pytest.fixture
async def hello(model: Path, source: tuple[ScriptedSource, str]) -> AsyncIterator[node_pb2.NodeHello]:
    """Of a prefill node whose blocks exist, all of generation 0, and whose announcements come from the scripted source."""
    rank = await InProcess(model, "prefill", 32, **SETTINGS).start()
    said = (await rank.stream()).hello
    assert said
    said.transfer_address = source[1]
    yield said
    await rank.stop()


LOGPROB = {"token_id": 42, "logprob": -1.0}
LIES: dict[str, list[Reply]] = {
    "no answer to open": [RELEASED],
    "released unasked": [QUEUED, RELEASED],
    "an empty message": [QUEUED, Reply()],
    "blocks left out": [QUEUED, announcement(1, 3)],
    "blocks again": [QUEUED, announcement(0, 2), announcement(1, 3, final=final())],
    "more blocks than the prompt has": [QUEUED, announcement(0, 5, final=final())],
    "more blocks than it has told of": [QUEUED, announcement(0, 4, generations=[0] * 5)],
    "nothing": [QUEUED, announcement(0, 0)],
    "all, and it is not all": [QUEUED, announcement(0, 3, final=final())],
    "another token": [QUEUED, announcement(0, 4, final=final(output_index=7))],
    "a token that does not exist": [QUEUED, announcement(0, 4, final=final(VOCAB))],
    "the last token": [QUEUED, announcement(0, 4, final=final(finish_reason=1))],
    "an end that nobody knows": [QUEUED, announcement(0, 4, final=final(finish_reason=77))],
    "a log-probability": [QUEUED, announcement(0, 4, final=final(logprob=LOGPROB))],
    "no number": [QUEUED, announcement(0, 4, final=final(logprob=LOGPROB | {"logprob": float("nan")}))],
    "blocks that do not exist": [QUEUED, announcement(0, 4, block_ids=[0, 1, 2, 32], final=final())],
    "blocks far away": [QUEUED, announcement(0, 4, block_ids=[2**32 - 1] * 4, final=final())],
}


async def test_a_source_that_lies_is_refused_and_the_sequence_sent_back(
    decode: InProcess, source: tuple[ScriptedSource, str], hello: node_pb2.NodeHello
) -> None:
    stream = await decode.stream()
    for number, (name, script) in enumerate(LIES.items(), 1):
        source[0].script = script
        await stream.decode(ask(name, PROMPT_LEN), hello, number)
        await eventually(lambda name=name: (name, 1) in stream.errors, f"the refusal of {name}")
        error = stream.errors[name, 1].error
        assert (error.retryable, error.cause, error.stage) == (True, "nonsense", "pull"), (name, error)
        assert not stream.ids(name), f"{name}: a token was taken"
        await eventually(lambda: decode.idle, "no block left behind")
    assert set(source[0].asked) == {"open"}, "a lease that was not read is not released"
    await relays_one(stream, source[0], hello)


async def relays_one(stream: Stream, source: ScriptedSource, hello: node_pb2.NodeHello) -> None:
    """What was refused has broken nothing."""
    source.script, source.last = [QUEUED, announcement(0, 4, final=final())], RELEASED
    await stream.decode(ask("good", PROMPT_LEN), hello, 99)
    await eventually(lambda: stream.finished("good"), "the last token")
    assert len(stream.ids("good")) == 8


LAST_WORDS: dict[str, Reply | grpc.StatusCode | None] = {
    "silence": None,
    "nothing": Reply(),
    "nonsense": QUEUED,
    "a second final token": announcement(4, 1, final=final(43)),
    "fenced": Reply(error={"message": "fenced", "cause": "fenced", "stage": "pull"}),
    "gone": grpc.StatusCode.UNAVAILABLE,
    "bug": grpc.StatusCode.INVALID_ARGUMENT,
}


async def test_a_release_that_is_not_answered_starts_nothing_again(
    decode: InProcess, source: tuple[ScriptedSource, str], hello: node_pb2.NodeHello
) -> None:
    """All blocks are here and verified: the sequence runs, and the lease ends by its own expiry."""
    stream = await decode.stream()
    source[0].script = [QUEUED, announcement(0, 4, final=final())]
    for number, (name, source[0].last) in enumerate(LAST_WORDS.items(), 1):
        await stream.decode(ask(name, PROMPT_LEN, seed=number), hello, number)
        await eventually(lambda name=name: stream.finished(name), "the last token")
        assert stream.ids(name)[0] == 42 and sorted(stream.ids(name)) == list(range(8))
        await eventually(lambda: decode.idle, "the end of the pull")
    assert source[0].asked == ["open", "release"] * len(LAST_WORDS)
    assert not stream.errors


async def test_a_lost_source_gets_a_new_channel_and_the_old_one_is_not_kept(
    decode: InProcess, source: tuple[ScriptedSource, str], hello: node_pb2.NodeHello
) -> None:
    stream = await decode.stream()
    client = decode.leader.client
    await relays_one(stream, source[0], hello)
    await eventually(lambda: decode.idle, "an idle node")
    assert client.num_channels == 1
    source[0].script = []  # accepts the stream, and says nothing
    await stream.decode(ask("silent", PROMPT_LEN), hello, 2)
    await eventually(lambda: ("silent", 1) in stream.errors, "the handshake's deadline")
    assert stream.errors["silent", 1].error.cause == "handshake"
    await eventually(lambda: client.num_channels == 0, "no channel kept")


async def test_giving_up_while_blocks_are_awaited_leaves_nothing(
    decode: InProcess, source: tuple[ScriptedSource, str], hello: node_pb2.NodeHello
) -> None:
    stream = await decode.stream()
    scripts: list[tuple[list[Reply], Callable[[], bool]]] = [
        ([], lambda: decode.leader.intake.num_open == 1),
        ([QUEUED, announcement(0, 2)], lambda: decode.life.counts().held == 2),
    ]
    for number, (script, ready) in enumerate(scripts):
        source[0].script = script
        await stream.decode(ask(f"r{number}", PROMPT_LEN), hello, number + 1)
        await eventually(ready, "a pull")
        await stream.cancel(f"r{number}")
        await eventually(lambda: decode.idle, "an idle node")
    assert not stream.errors
