"""Nodes that can never work together or with this router: what operators and clients see, at once and not after a timeout."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from baton.client import Client
from baton.config import PROTOCOL_VERSION, BatonConfig, RouterConfig
from baton.errors import Unavailable
from router.server import RouterServer
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode
from tests.router.test_dispatch import asked, collect, echo, nodes, text_of, until

AT_ONCE_S = 10.0  # far less than router.no_node_s, for which a request waits where that might help


@pytest.mark.parametrize("deaf", [False, True])
async def test_a_node_of_another_protocol_is_refused_by_whichever_side_notices(make_dispatcher: MakeDispatcher, deaf: bool) -> None:
    """An older node says so by itself; one that does not look is refused by its hello. Either way both versions are named."""
    prefill, decode = EchoNode("prefill", "prefill-0"), EchoNode("decode", "decode-0", protocol_version=1)
    decode.faults.deaf = deaf
    dispatcher = await make_dispatcher(prefill, decode, wait=False)
    pair = dispatcher.fleet.registry.pairs()[0]
    await until(lambda: pair.refusal, "the refusal")
    assert "protocol 1" in pair.refusal or f"protocol {PROTOCOL_VERSION}, this node 1" in pair.refusal
    assert str(PROTOCOL_VERSION) in pair.refusal and decode.address in pair.refusal
    assert [group["state"] for group in dispatcher.status()["groups"] if group["role"] == "decode"] == ["refused"]
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(collect(dispatcher, asked(max_tokens=4)), AT_ONCE_S)
    assert pair.refusal in caught.value.message
    decode.protocol_version = PROTOCOL_VERSION  # the node is updated
    await until(dispatcher.ready, "the proof")
    assert text_of(await collect(dispatcher, asked(max_tokens=4))) == echo(4)


async def test_a_node_that_comes_back_with_another_protocol_is_refused_then(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    pair = dispatcher.fleet.registry.pairs()[0]
    port = int(decode.address.rpartition(":")[2])
    await decode.stop()
    decode.protocol_version = 1
    await decode.start(port)
    await until(lambda: pair.refusal, "the refusal")
    with pytest.raises(Unavailable, match="protocol"):
        await asyncio.wait_for(collect(dispatcher, asked(max_tokens=4)), AT_ONCE_S)


async def test_a_request_under_way_does_not_wait_for_what_cannot_come(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode)
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=4000, timeout_s=600)))
    await until(lambda: decode.num_active == 1, "decode to run")
    port = int(decode.address.rpartition(":")[2])
    await decode.stop()
    decode.protocol_version = 1
    await decode.start(port)
    await asyncio.wait([running], timeout=AT_ONCE_S)
    assert running.done(), dispatcher.status()
    with pytest.raises(Unavailable, match="protocol") as caught:
        await asyncio.wait_for(running, AT_ONCE_S)
    assert (caught.value.cause, caught.value.retryable) == ("incompatible", False)


async def test_a_node_that_fits_nobody_is_passed_by(make_dispatcher: MakeDispatcher) -> None:
    """Neither its shorter sequences nor its refusal concern requests that the others can serve."""
    prefill, decode = nodes()
    other = EchoNode("decode", "decode-1", fingerprint="other", max_model_len=16)
    dispatcher = await make_dispatcher(prefill, decode, other)
    refused = dispatcher.fleet.registry.pairs()[1]
    await until(lambda: refused.refusal, "the refusal")
    answers = await asyncio.gather(*(collect(dispatcher, asked(max_tokens=40)) for _ in range(8)))
    assert {text_of(chunks) for chunks in answers} == {echo(40)}
    # Alone it may have been proven, if it came before anyone it could be compared with.
    assert all(request.request_id.startswith("proof-") for request in other.received) and not refused.proven
    assert dispatcher.model_card().max_model_len == decode.max_model_len


async def test_everybody_who_asks_is_told_why_no_pair_will_ever_work(model_dir: Path) -> None:
    """The launch, health, status, and clients of both fronts."""
    server = RouterServer(BatonConfig(model=str(model_dir), served_model_name="echo", router=RouterConfig(http_port=0, grpc_port=0)))
    pair = EchoNode("prefill", "prefill-0"), EchoNode("decode", "decode-0", fingerprint="other")
    try:
        addresses = await server.start()
        for node in pair:
            server.dispatcher.add_group(node.role, await node.start())
        with pytest.raises(Unavailable) as caught:
            await server.wait_ready(60)
        why = "model: echo there, other here"
        assert all(said in caught.value.message for said in (why, "prefill-0 has protocol version", "decode-0/0 has protocol version"))
        async with httpx.AsyncClient(base_url=f"http://{addresses['http']}") as http, asyncio.timeout(AT_ONCE_S):
            health = await http.get("/health")
            assert health.status_code == 503 and why in health.json()["reason"]
            answer = await http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "incompatible")
            assert why in answer.json()["error"]["message"]
        async with Client(addresses["grpc"]) as client, asyncio.timeout(AT_ONCE_S):
            status = await client.status()
            assert not status.ready and [why in told.refusal for told in status.pairs] == [True, True], "nor may decode answer alone"
            with pytest.raises(Unavailable, match=why):
                await client.complete("hello", max_tokens=5)
    finally:
        await server.stop()
        for node in pair:
            await node.stop()
