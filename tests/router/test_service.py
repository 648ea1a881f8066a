"""The router as a server: real gRPC and HTTP on free ports over echo nodes, through the real client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.client import Client, make_request
from baton.config import BatonConfig, RouterConfig
from baton.errors import (
    BatonError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from baton.request import FinishReason
from baton.rpc import open_channel
from baton.v1 import inference_pb2_grpc
from baton.wire import generate_request_to_message
from router.membership import NodeReport
from router.server import RouterServer
from tests.router.echo_nodes import EchoNode
from tests.router.echo_tokenizer import save_tokenizer

PROMPT = "hello echo "


class Running:
    """A router with its nodes, its addresses and a client."""

    def __init__(self, server: RouterServer, addresses: dict[str, str], nodes: tuple[EchoNode, ...], client: Client) -> None:
        self.server = server
        self.addresses = addresses
        self.prefill, self.decode = nodes
        self.client = client


@asynccontextmanager
async def running(model_dir: Path, *, step_s: float = 0.0, **router: object) -> AsyncIterator[Running]:
    settings = RouterConfig.model_validate({"http_port": 0, "grpc_port": 0, **router})
    server = RouterServer(BatonConfig(model=str(model_dir), served_model_name="echo", router=settings))
    nodes = EchoNode("prefill", "prefill-0", step_s=step_s), EchoNode("decode", "decode-0", step_s=step_s)
    try:
        addresses = await server.start()
        for node in nodes:
            server.dispatcher.add_group(node.role, await node.start())
        await server.wait_ready(20)
        async with Client(addresses["grpc"]) as client:
            yield Running(server, addresses, nodes, client)
    finally:
        await server.stop()
        for node in nodes:
            await node.stop()


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what other processes have noticed has no event here
            await asyncio.sleep(0.01)


def told(node: EchoNode) -> set[str]:
    """Clients' requests that a node was told to cancel; tokens that come late make the router say it again."""
    return {request_id for request_id, _ in node.cancelled if not request_id.startswith("proof-")}


async def test_text_ids_and_messages_stream(model_dir: Path) -> None:
    async with running(model_dir) as router:
        chunks = [chunk async for chunk in router.client.generate(PROMPT, max_tokens=11, temperature=0.0)]
        assert "".join(chunk.text for chunk in chunks) == PROMPT
        assert all(chunk.is_delta for chunk in chunks)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        (by_ids,) = await router.client.complete(list(PROMPT.encode()), max_tokens=4, temperature=0.0)
        assert len(by_ids.token_ids) == 4
        (chat,) = await router.client.complete([{"role": "user", "content": "hi"}], max_tokens=8, temperature=0.0)
        assert chat.text == "user: hi"


async def test_an_answer_that_is_not_streamed_is_one_chunk_per_choice(model_dir: Path) -> None:
    async with running(model_dir) as router:
        chunks = [chunk async for chunk in router.client.generate(PROMPT, max_tokens=11, n=2, seed=5, stream=False, logprobs=1)]
        assert sorted((chunk.choice, chunk.text, chunk.is_delta) for chunk in chunks) == [(0, PROMPT, False), (1, PROMPT, False)]
        assert [chunk.usage is not None for chunk in chunks] == [False, True]
        answers = await router.client.complete(PROMPT, max_tokens=11, n=2, seed=5, logprobs=1)
        assert [answer.seed for answer in answers] == [5, 6]
        assert answers[0].usage.completion_tokens == 22
        assert [len(answer.logprobs) for answer in answers] == [11, 11]


async def test_errors_arrive_as_they_were_raised(model_dir: Path) -> None:
    async with running(model_dir) as router:
        with pytest.raises(InvalidRequest, match="temperature"):
            await router.client.complete(PROMPT, temperature=-1.0)
        with pytest.raises(InvalidRequest, match="cannot carry"):
            await router.client.complete(PROMPT, max_tokens=-1)
        with pytest.raises(InvalidRequest, match="prompt"):
            await router.client.complete([{"role": "user"}])
        with pytest.raises(NotFound, match="gpt-9"):
            await router.client.complete(PROMPT, model="gpt-9")
        router.decode.faults.refuse = ResourceExhausted("full: 0 of 64 blocks", stage="decode", node="decode-0", retry_after_s=3.0)
        with pytest.raises(ResourceExhausted, match="0 of 64") as caught:
            await router.client.complete(PROMPT, max_tokens=5)
        facts = caught.value
        assert (facts.stage, facts.node, facts.retryable, facts.retry_after_s) == ("decode", "decode-0", True, 3.0)


async def test_the_clients_deadline_and_its_leaving_reach_the_nodes(model_dir: Path) -> None:
    async with running(model_dir, step_s=0.01) as router:
        with pytest.raises(DeadlineExceeded):
            await router.client.complete(PROMPT, max_tokens=3000, timeout_s=1.0)
        await until(lambda: len(told(router.decode)) == 1)
        async with aclosing(router.client.generate(PROMPT, max_tokens=3000)) as chunks:
            await anext(chunks)
        await until(lambda: len(told(router.decode)) == 2 and len(told(router.prefill)) == 2)
        await until(lambda: router.server.dispatcher.num_running == 0)
        assert router.decode.num_active == 0


@pytest.mark.relay
async def test_a_client_that_reads_nothing_is_given_up(model_dir: Path) -> None:
    narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
    request = generate_request_to_message(make_request("x" * 3900, {"max_tokens": 190, "n": 100, "echo": True, "ignore_eos": True}))
    async with running(model_dir, slow_client_s=0.3) as router, grpc.aio.insecure_channel(router.addresses["grpc"], narrow) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        await call.read()
        await until(lambda: b'baton_requests_total{outcome="slow_client"} 1.0' in router.server.dispatcher.metrics())
        assert router.server.dispatcher.num_running == 0
        await until(lambda: router.decode.num_active == 0)  # as soon as the Cancels have arrived
        await until(lambda: not any("Inference/Generate" in task.get_name() for task in asyncio.all_tasks()))  # nor has it a call any more
        with pytest.raises(grpc.RpcError, match="unread"):
            while await call.read() is not grpc.aio.EOF:
                pass


async def test_a_message_over_the_limit_is_too_large(model_dir: Path) -> None:
    async with running(model_dir, max_body_bytes=1000) as router:
        with pytest.raises(TooLarge, match="larger than max") as caught:
            await router.client.complete("x" * 1100)
        assert not caught.value.retryable
        channel = open_channel(router.addresses["grpc"])
        async with channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(generate_request_to_message(make_request("x" * 1100, {})))
            with pytest.raises(grpc.RpcError) as refused:
                await call.read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await router.client.complete(PROMPT, max_tokens=3))[0].text == PROMPT[:3]
        assert router.server.dispatcher.num_received == 1


async def test_what_the_model_asks_and_nobody_does_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5, "repetition_penalty": 1.05}')
    server = RouterServer(BatonConfig(model=str(tmp_path), router=RouterConfig(http_port=0, grpc_port=0)))
    try:
        await server.start()
    finally:
        await server.stop()
    (said,) = [record.__dict__["baton_fields"] for record in caplog.records if "not applied" in record.message]
    assert said == {"asked": "repetition_penalty 1.05"}


async def test_keys_are_asked_for_by_every_call(model_dir: Path) -> None:
    async with running(model_dir, api_keys=("first", "second")) as router:
        for call in (
            router.client.complete(PROMPT),
            router.client.models(),
            router.client.status(),
            router.client.drain("x", 0),
            router.client.restore("x"),
            router.client.flush_cache(),
        ):
            with pytest.raises(Unauthenticated):
                await call
        async with Client(router.addresses["grpc"], api_key="wrong") as wrong:
            with pytest.raises(Unauthenticated):
                await wrong.models()
        async with Client(router.addresses["grpc"], api_key="second") as right:
            assert (await right.complete(PROMPT, max_tokens=5))[0].text == PROMPT[:5]


async def test_status_models_and_drain(model_dir: Path) -> None:
    async with running(model_dir, no_node_s=0.1) as router:
        (model,) = await router.client.models()
        assert (model.name, model.max_model_len, model.dtype) == ("echo", 4096, "float32")
        await router.client.complete(PROMPT, max_tokens=5)
        status = await router.client.status()
        assert status.ready and status.requests_total == 1 and status.requests_running == 0
        assert [(group.node, group.role, group.state) for group in status.groups] == [
            ("prefill-0", "prefill", "ready"),
            ("decode-0", "decode", "ready"),
        ]
        pairs = [(pair.prefill, pair.decode, pair.refusal) for pair in status.pairs]
        assert pairs == [("prefill-0", "decode-0/0", ""), ("", "decode-0/0", "")], "the last is decode alone"
        assert status.pairs[0].proven
        assert (await router.client.drain("decode-0", 10)).idle
        with pytest.raises(NotFound):
            await router.client.drain("decode-9", 0)
        assert not (await router.client.status()).ready
        with pytest.raises(BatonError, match="0 of 1 decode") as caught:
            await router.client.complete(PROMPT, max_tokens=5)
        assert isinstance(caught.value, Unavailable)
        await router.client.restore("decode-0")
        assert (await router.client.status()).ready
        with pytest.raises(NotFound):
            await router.client.restore("decode-9")


async def test_what_the_supervisor_says_is_shown_and_what_it_should_know_waits_for_it(model_dir: Path) -> None:
    async with running(model_dir) as router, httpx.AsyncClient(base_url=f"http://{router.addresses['http']}") as http:
        dispatcher = router.server.dispatcher
        dispatcher.report_node(NodeReport("decode-1", "decode", "loading", "rank 0 died", lives=2))
        assert [(node.node, node.role, node.stage, node.why, node.lives) for node in (await router.client.status()).nodes] == [
            ("decode-1", "decode", "loading", "rank 0 died", 2)
        ]
        assert "decode-1 is being rebuilt: loading (rank 0 died)" in (await http.get("/health?verbose")).json()["summary"]
        reply = await router.client.drain("decode-0", 10, retire=True)
        assert (reply.idle, reply.handed_over) == (True, 0)
        assert [(notice.kind, notice.node) for notice in await dispatcher.notices.take(20)] == [("retire", "decode-0")]
        health = await http.get("/health")
        assert health.status_code == 503 and "decode-1 is being rebuilt" in health.json()["reason"]


async def test_stopping_with_time_to_drain_lets_requests_finish(model_dir: Path) -> None:
    """While they do, health says over both fronts that nobody should come, and whoever comes is told why not."""
    async with running(model_dir, step_s=0.01) as router, open_channel(router.addresses["grpc"]) as channel:
        answers = [asyncio.create_task(router.client.complete(PROMPT, max_tokens=150, temperature=0.0)) for _ in range(2)]
        await until(lambda: router.decode.num_active == 2)
        stopping = asyncio.create_task(router.server.stop(drain_s=60))
        async with httpx.AsyncClient(base_url=f"http://{router.addresses['http']}") as http:
            await until(lambda: not router.server.dispatcher.ready())
            health = await http.get("/health")
            assert health.status_code == 503 and "shutting down" in health.json()["reason"]
        request, serving = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
        assert (await health_pb2_grpc.HealthStub(channel).Check(request)).status == serving.NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down"):
            await router.client.complete(PROMPT, max_tokens=5)
        assert [(await answer)[0].finish_reason for answer in answers] == [FinishReason.LENGTH] * 2
        await stopping


async def test_flushing_caches(model_dir: Path) -> None:
    async with running(model_dir) as router, httpx.AsyncClient(base_url=f"http://{router.addresses['http']}") as http:
        router.prefill.cached_blocks, router.decode.cached_blocks = 3, 4
        assert await router.client.flush_cache("prefill-0") == 3
        assert (await http.post("/flush_cache")).json() == {"groups": 2, "blocks": 4}
        with pytest.raises(NotFound, match="known are decode-0, prefill-0"):
            await router.client.flush_cache("prefill-9")
        router.decode.faults.die_at_flush = True
        with pytest.raises(Unavailable, match="died on purpose") as caught:
            await router.client.flush_cache()
        assert (caught.value.cause, caught.value.retryable) == ("node_lost", True)


async def test_health_and_reflection(model_dir: Path) -> None:
    async with running(model_dir) as router, open_channel(router.addresses["grpc"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        serving = health_pb2.HealthCheckResponse
        watch = health.Watch(request)
        async with asyncio.timeout(10):
            async for answer in watch:
                if answer.status == serving.SERVING:
                    await router.decode.stop()
                elif router.decode.address and not router.server.dispatcher.ready():
                    break
        assert (await health.Check(request)).status == serving.NOT_SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        async for answer in answers:
            names = {service.name for service in answer.list_services_response.service}
            assert {"baton.v1.Inference", "baton.v1.Admin", "grpc.health.v1.Health"} <= names


async def test_http_is_served_beside_it(model_dir: Path) -> None:
    async with running(model_dir) as router, httpx.AsyncClient(base_url=f"http://{router.addresses['http']}") as http:
        assert (await http.get("/health")).status_code == 200
        verbose = (await http.get("/health?verbose")).json()
        assert verbose["pairs"][0]["proven"] is True
        answer = await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5, "temperature": 0})
        assert answer.json()["choices"][0]["text"] == PROMPT[:5]
        assert 'baton_requests_total{outcome="length"} 1.0' in (await http.get("/metrics")).text
        assert (await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 10**6})).status_code == 400


async def test_stopping_tells_every_client_and_frees_the_ports(model_dir: Path) -> None:
    """Running and queued, over gRPC and HTTP, streamed or not: each gets one error that says why, before the ports close."""
    async with running(model_dir, step_s=0.01, max_running=3) as router, httpx.AsyncClient() as http:
        url, body = f"http://{router.addresses['http']}/v1/completions", {"model": "echo", "prompt": PROMPT, "max_tokens": 4000}
        requests = [asyncio.create_task(router.client.complete(PROMPT, max_tokens=4000)) for _ in range(2)]
        await until(lambda: router.decode.num_active == 2)
        streamed = asyncio.create_task(http.post(url, json={**body, "stream": True}))
        await until(lambda: router.decode.num_active == 3)
        queued = asyncio.create_task(http.post(url, json=body))
        await until(lambda: router.server.dispatcher.status()["requests_queued"] == 1)
        await router.server.stop()
        for request in requests:
            with pytest.raises(Unavailable) as told:
                await request
            assert (told.value.cause, told.value.retryable) == ("shutting_down", True)
        assert '"code":"shutting_down"' in (await streamed).text
        assert (await queued).status_code == 503
        assert (await queued).json()["error"]["code"] == "shutting_down"
        await until(lambda: not router.decode.sessions)
        with pytest.raises(grpc.RpcError):
            async with open_channel(router.addresses["grpc"]) as channel:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)


async def test_a_taken_port_is_a_configuration_error(model_dir: Path) -> None:
    async with running(model_dir) as router:
        port = int(router.addresses["grpc"].rpartition(":")[2])
        settings = RouterConfig(http_port=0, grpc_port=port)
        server = RouterServer(BatonConfig(model=str(model_dir), router=settings))
        with pytest.raises(ConfigError, match=str(port)):
            await server.start()
        await server.stop()


async def test_not_being_ready_is_explained(model_dir: Path) -> None:
    server = RouterServer(BatonConfig(model=str(model_dir), router=RouterConfig(http_port=0, grpc_port=0)))
    try:
        await server.start()
        with pytest.raises(DeadlineExceeded, match="0 of 0 prefill"):
            await server.wait_ready(0.05)
    finally:
        await server.stop()
