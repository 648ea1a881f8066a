"""The doors of a prefill and a decode rank with a real engine: what a router or a rank says that should not have been.

Bytes that are no message, and messages with values at their edges, on control streams and between ranks: refused in our own words. The
rank steps on, gives the right tokens to a good request afterwards, and holds no block once it is idle.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from baton.config import PROTOCOL_VERSION
from baton.request import Sampling, SequenceRequest
from baton.rpc import open_channel, to_error
from baton.v1 import node_pb2, rank_pb2
from baton.wire import sequence_to_message
from tests.fuzz.hostile import PATIENCE_S, WRITTEN_TOO_LATE, effort, messages, near, no_alarms, noise
from tests.relay.inprocess import InProcess, Stream, ask, eventually
from tests.tiny_models import make_tiny

BUGS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
HELLO = node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=b"f" * 16)
SEQUENCE = sequence_to_message(SequenceRequest("hostile", 1, tuple(range(4, 40)), Sampling(max_tokens=3, temperature=0.0)), 5.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def prefill(model: Path) -> AsyncIterator[InProcess]:
    rank = await InProcess(model, "prefill", 24, max_model_len=192, transfer={"transport": "tcp"}).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle prefill node")
    await rank.stop()


@pytest.fixture
async def decode(model: Path) -> AsyncIterator[InProcess]:
    rank = await InProcess(model, "decode", 24, max_model_len=192, transfer={"transport": "tcp"}).start()
    yield rank
    await eventually(lambda: rank.idle, "an idle decode node")
    await rank.stop()


async def tell(channel: grpc.aio.Channel, method: str, lines: list[bytes]) -> None:
    """Say this on a stream, which the node ends, if it does, by a word of ours."""
    call = channel.stream_stream(method)()
    try:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # over already: reading says how
            for line in lines:
                await call.write(line)
        async with asyncio.timeout(0.3):
            while await call.read() is not grpc.aio.EOF:
                continue
    except TimeoutError:
        return  # it lets the stream go on
    except grpc.aio.AioRpcError as error:
        assert error.code() not in BUGS or error.details() == WRITTEN_TOO_LATE, (error.details(), lines)
    finally:
        call.cancel()


def said(hello: Message, good: list[Message]) -> st.SearchStrategy[list[bytes]]:
    """A hello, mostly, then commands that are good, spoilt, overdone or none."""
    words = st.sampled_from(good)
    overdone = (words.flatmap(near) | messages(type(hello))).map(lambda message: message.SerializeToString())
    spoilt = words.flatmap(lambda word: noise(word.SerializeToString()))
    start = st.sampled_from([[hello.SerializeToString()]] * 4 + [[]])
    return st.builds(list.__add__, start, st.lists(overdone | overdone | spoilt, min_size=1, max_size=5))


PREFILL_WORDS: list[Message] = [
    node_pb2.PrefillCommand(prefill=node_pb2.PrefillRequest(sequence=SEQUENCE, lease_number=7)),
    node_pb2.PrefillCommand(prefill=node_pb2.PrefillRequest(sequence=SEQUENCE)),
    node_pb2.PrefillCommand(accepted=node_pb2.DecodeAccepted(lease_number=7)),
    node_pb2.PrefillCommand(cancel=node_pb2.Cancel(request_id="hostile", attempt=1)),
    node_pb2.PrefillCommand(check=node_pb2.Check(request_id="hostile", attempt=1)),
    node_pb2.PrefillCommand(flush=node_pb2.FlushCache(number=1)),
    node_pb2.PrefillCommand(hello=HELLO),
]
DECODE_WORDS: list[Message] = [
    node_pb2.DecodeCommand(decode=node_pb2.DecodeRequest(sequence=SEQUENCE)),
    node_pb2.DecodeCommand(
        decode=node_pb2.DecodeRequest(
            sequence=SEQUENCE,
            lease=node_pb2.LeaseId(prefill_incarnation=b"i" * 16, number=3),
            transfer_address="127.0.0.1:9",
            exports=[node_pb2.ExportHandle(nonce=bytes(16), tcp_address="127.0.0.1:9")],
        )
    ),
    node_pb2.DecodeCommand(cancel=node_pb2.Cancel(request_id="hostile", attempt=1)),
    node_pb2.DecodeCommand(check=node_pb2.Check(request_id="hostile", attempt=1)),
    node_pb2.DecodeCommand(flush=node_pb2.FlushCache(number=1)),
]


async def answers(router: Stream, name: str, run: object) -> dict[int, int]:
    """The tokens of a good request."""
    await run  # type: ignore[misc]
    await eventually(lambda: router.finished(name) or bool(router.errors), f"the end of {name}")
    assert not router.errors, router.errors
    return router.ids(name)


@effort(5)
@given(batch=st.lists(said(node_pb2.PrefillCommand(hello=HELLO), PREFILL_WORDS), min_size=8, max_size=16))
async def test_a_prefill_node_hears_anything_and_steps_on(prefill: InProcess, batch: list[list[bytes]]) -> None:
    with no_alarms():
        async with open_channel(prefill.host.address.control) as channel, asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(tell(channel, "/baton.v1.PrefillNode/Control", lines) for lines in batch))
        router = await prefill.stream()
        name = f"good-{len(prefill.streams)}"
        tokens = await answers(router, name, router.prefill(ask(name, 40, max_tokens=1), 0))
        await router.close()
        assert tokens == {0: tokens[0]} and not prefill.life.failed.is_set()
        await eventually(lambda: prefill.idle, "an idle node")


@effort(5)
@given(batch=st.lists(said(node_pb2.DecodeCommand(hello=HELLO), DECODE_WORDS), min_size=8, max_size=16))
async def test_a_decode_node_hears_anything_and_steps_on(decode: InProcess, batch: list[list[bytes]]) -> None:
    with no_alarms():
        async with open_channel(decode.host.address.control) as channel, asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(tell(channel, "/baton.v1.DecodeNode/Control", lines) for lines in batch))
        router = await decode.stream()
        name = f"good-{len(decode.streams)}"
        alone = node_pb2.DecodeRequest(sequence=sequence_to_message(ask(name, 40, max_tokens=5), 60.0))
        tokens = await answers(router, name, router.say(decode=alone))
        await router.close()
        assert sorted(tokens) == [0, 1, 2, 3, 4]
        await eventually(lambda: decode.idle, "an idle node")


def packed(message: Message) -> bytes:
    return message.SerializeToString()


RANK_WORDS: dict[str, Message] = {
    "Wake": rank_pb2.WakeRequest(),
    "Sources": rank_pb2.SourcesRequest(
        prefill_incarnation=b"i" * 16, exports=[node_pb2.ExportHandle(nonce=bytes(16), tcp_address="127.0.0.1:9")]
    ),
    "Read": rank_pb2.ReadRequest(
        lease=node_pb2.LeaseId(prefill_incarnation=b"i" * 16), source_blocks=[1], generations=[1], target_blocks=[1], time_left_s=1.0
    ),
    "Export": rank_pb2.ExportRequest(),
    "Ping": rank_pb2.PingRequest(),
}


@effort(5)
@given(data=st.data())
async def test_a_rank_hears_anything_from_other_ranks(decode: InProcess, data: st.DataObject) -> None:
    names = st.sampled_from([name for name in RANK_WORDS if name != "Wake"])  # a wake is a step, and there is nobody to join it
    raw = names.flatmap(lambda name: st.tuples(st.just(name), near(RANK_WORDS[name]).map(packed) | noise(packed(RANK_WORDS[name]))))
    batch = data.draw(st.lists(raw, min_size=8, max_size=16))
    with no_alarms():
        async with open_channel(decode.host.address.control) as channel, asyncio.timeout(PATIENCE_S):
            calls = [channel.unary_unary(f"/baton.v1.RankControl/{name}")(line, timeout=PATIENCE_S / 2) for name, line in batch]
            ends = await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(grpc.aio.AioRpcError, match="which cannot have begun"):
                far = rank_pb2.WakeRequest(epoch=data.draw(st.integers(2**20, 2**64 - 1)))
                await channel.unary_unary("/baton.v1.RankControl/Wake")(packed(far))
        for said_to, end in zip(batch, ends, strict=True):
            assert isinstance(end, bytes) or (isinstance(end, grpc.aio.AioRpcError) and end.code() not in BUGS), (said_to, end)
            assert isinstance(end, bytes) or to_error(end).cause != "deadline", said_to
