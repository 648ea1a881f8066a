"""The router's gRPC door: bytes that are no message, and messages with values at their edges, to every method.

Whatever comes, the call ends with a status that says something, no bug of ours shows, and a good request is served afterwards.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from baton.client import Client
from baton.rpc import open_channel
from baton.v1 import admin_pb2, inference_pb2
from tests.fuzz.conftest import Running
from tests.fuzz.hostile import PATIENCE_S, effort, messages, near, no_alarms, noise

BUGS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
GOOD = inference_pb2.GenerateRequest(text="abc", sampling=inference_pb2.Sampling(max_tokens=2))
CHAT = inference_pb2.GenerateRequest(
    chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")]), sampling=GOOD.sampling
)
METHODS: dict[str, Message] = {
    "/baton.v1.Inference/Generate": GOOD,
    "/baton.v1.Inference/Models": inference_pb2.ModelsRequest(),
    "/baton.v1.Admin/Status": admin_pb2.StatusRequest(),
    "/baton.v1.Admin/Drain": admin_pb2.DrainRequest(node="nobody", timeout_s=1.0),
    "/baton.v1.Admin/Restore": admin_pb2.RestoreRequest(node="nobody"),
    "/baton.v1.Admin/FlushCache": admin_pb2.FlushCacheRequest(node="nobody"),
    "/grpc.health.v1.Health/Check": admin_pb2.FlushCacheRequest(node="baton.v1.Inference"),  # the same bytes
}


async def outcome(channel: grpc.aio.Channel, method: str, raw: bytes) -> grpc.StatusCode:
    """How a call with these bytes ends; every one may be answered by a stream."""
    call = channel.unary_stream(method)(raw, timeout=PATIENCE_S)
    try:
        async for _ in call:
            continue
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def is_well(router: Running) -> bool:
    async with Client(router.grpc) as client:
        (choice,) = await client.complete("abc", max_tokens=2, ignore_eos=True)
        return choice.text == "ab" and (await client.status()).ready


@effort(6)
@given(
    batch=st.lists(
        st.sampled_from(list(METHODS)).flatmap(lambda m: st.tuples(st.just(m), noise(METHODS[m].SerializeToString()))),
        min_size=20,
        max_size=40,
    )
)
async def test_any_bytes_end_in_a_status(router: Running, batch: list[tuple[str, bytes]]) -> None:
    with no_alarms() as alarms:
        async with open_channel(router.grpc) as channel:
            codes = await asyncio.gather(*(outcome(channel, *each) for each in batch))
        for (method, raw), code in zip(batch, codes, strict=True):
            assert code not in BUGS or method.startswith("/grpc."), (method, raw, code)
            assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, (method, raw)
        assert await is_well(router)
        alarms.heard = [alarm for alarm in alarms.heard if "grpc.health" not in alarm]  # gRPC's own: it logs what it cannot read


def requests() -> st.SearchStrategy[tuple[str, Message]]:
    """Good requests with some fields overwritten, and others made of nothing else."""
    generate = near(GOOD) | near(CHAT) | messages(inference_pb2.GenerateRequest)
    others = st.sampled_from(list(METHODS)[1:-1]).flatmap(lambda method: st.tuples(st.just(method), near(METHODS[method])))
    return generate.map(lambda message: ("/baton.v1.Inference/Generate", message)) | others


@effort(4)
@given(batch=st.lists(requests(), min_size=20, max_size=40))
async def test_any_values_are_taken_or_refused(router: Running, batch: list[tuple[str, Any]]) -> None:
    batch = [(method, message) for method, message in batch if message.DESCRIPTOR.name != "DrainRequest" or "-" not in message.node]
    with no_alarms():
        async with open_channel(router.grpc) as channel:
            codes = await asyncio.gather(*(outcome(channel, method, message.SerializeToString()) for method, message in batch))
        for (method, message), code in zip(batch, codes, strict=True):
            assert code not in BUGS and code is not grpc.StatusCode.DEADLINE_EXCEEDED, (method, code, str(message)[:2000])
        assert await is_well(router)
