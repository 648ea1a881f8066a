"""Both doors of one router refuse the same requests in the same words, and everything that is turned away shows up in /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from baton.client import Client
from baton.config import BatonConfig, RouterConfig
from baton.errors import InvalidRequest
from baton.rpc import open_channel
from router.server import RouterServer
from tests.router.echo_nodes import EchoNode

LIMITS = {"http_port": 0, "grpc_port": 0, "max_n": 3, "max_stop_strings": 2, "max_stop_chars": 5, "max_timeout_s": 100.0}


class Running:
    """A router over a pair of echo nodes."""

    def __init__(self, server: RouterServer, addresses: dict[str, str]) -> None:
        self.dispatcher = server.dispatcher
        self.grpc = addresses["grpc"]
        self.http = f"http://{addresses['http']}"


@pytest.fixture
async def router(model_dir: Path) -> AsyncIterator[Running]:
    server = RouterServer(BatonConfig(model=str(model_dir), served_model_name="echo", router=RouterConfig.model_validate(LIMITS)))
    nodes = [EchoNode("prefill", "prefill-0"), EchoNode("decode", "decode-0")]
    try:
        addresses = await server.start()
        for node in nodes:
            server.dispatcher.add_group(node.role, await node.start())
        await server.wait_ready(20)
        yield Running(server, addresses)
    finally:
        await server.stop()
        for node in nodes:
            await node.stop()


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"n": 4}, "n", "n must be 1 to 3, not 4"),
        ({"stop": ["a", "b", "c"]}, "stop", "stop has 3 strings, at most 2 are allowed"),
        ({"stop": ["abcdef"]}, "stop", "stop has a string of 6 characters, 1 to 5 are allowed"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "stop_token_ids has 65 ids, at most 64 are allowed"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids", "stop_token_ids holds 100000, token ids are 0 to"),
        ({"temperature": 101.0}, "temperature", "temperature must be 0 to 100.0, not 101"),
        ({"max_tokens": 5000}, "max_tokens", "max_tokens 5000 and 1 prompt tokens make 5001, at most 4096 fit; ask for at most 4095"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens 9 is more than max_tokens 8"),
        ({"prompt": [1, 100_000]}, "prompt", "prompt holds 100000, token ids are 0 to"),
        ({"prompt": [1] * 4096}, "prompt", "prompt has 4096 tokens; with an answer of at least 1 token that is more than the 4096"),
        ({"timeout_s": 101.0}, "timeout_s", "timeout_s must be more than 0 and at most 100, not 10"),
    ],
)
async def test_a_limit_is_the_same_at_both_doors(router: Running, options: dict[str, Any], param: str, message: str) -> None:
    prompt = options.pop("prompt", "x")
    headers = {"X-Request-Timeout-S": str(options["timeout_s"])} if "timeout_s" in options else {}
    fields = {name: value for name, value in options.items() if name != "timeout_s"}
    async with httpx.AsyncClient(base_url=router.http) as http:
        response = await http.post("/v1/completions", json={"prompt": prompt, **fields}, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and error["message"].startswith(message)
    async with Client(router.grpc) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.complete(prompt, **options)
    assert caught.value.message.startswith(message) and caught.value.cause == error["code"]


async def test_names_are_bounded_at_both_doors(router: Running) -> None:
    async with httpx.AsyncClient(base_url=router.http) as http, Client(router.grpc) as client:
        response = await http.post("/v1/completions", json={"prompt": "x", "model": "m" * 10_000})
        assert response.status_code == 400 and "model may have 256 printable characters" in response.json()["error"]["message"]
        for options, message in (
            ({"model": "m" * 10_000}, "model may have 256 printable characters"),
            ({"request_id": "r" * 257}, "request_id may have 256 printable characters, not 257"),
            ({"request_id": "a\nb"}, "request_id may have 256 printable"),
        ):
            with pytest.raises(InvalidRequest, match=message):
                await client.complete("x", **options)
        with pytest.raises(InvalidRequest, match="role must be one of assistant, developer, system, user, not 'tool'"):
            await client.complete([{"role": "tool", "content": "x"}])
        with pytest.raises(InvalidRequest, match="there are 5000 messages, at most 4096"):
            await client.complete([{"role": "user", "content": ""}] * 5000)


async def test_what_is_turned_away_is_counted_by_door_and_reason(router: Running) -> None:
    liar = EchoNode("decode", "decode\n9")
    router.dispatcher.add_group("decode", await liar.start())
    async with httpx.AsyncClient(base_url=router.http) as http, open_channel(router.grpc) as channel:
        assert (await http.post("/v1/completions", content=b"{")).status_code == 400
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/baton.v1.Inference/Models")(b"\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        expected = [
            'baton_refused_total{door="http",reason="invalid_request"} 1.0',
            'baton_refused_total{door="grpc",reason="malformed"} 1.0',
            'baton_refused_total{door="control",reason="malformed"} ',
        ]
        metrics = ""
        async with asyncio.timeout(20):
            while not all(line in metrics for line in expected):
                await asyncio.sleep(0.01)
                metrics = (await http.get("/metrics")).text
    assert "decode\n9" not in metrics and router.dispatcher.ready()
    await liar.stop()
