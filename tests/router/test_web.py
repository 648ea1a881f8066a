"""The HTTP front over a real server and real clients: formats, streams, errors, keys, limits, and a request that ends when its client goes.

What generates is `EchoEngine`: prompts come back token by token.
"""

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest

from baton.errors import ConfigError, NodeLost, ResourceExhausted
from baton.telemetry import CONTENT_TYPE
from baton.tokenizer import Tokenizer
from router.web import create_app, serve
from tests.router.echo_engine import MAX_MODEL_LEN, EchoEngine
from tests.tiny_tokenizers import make_byte_level

FULL = ResourceExhausted("1 running, 0 may wait", stage="admission", cause="queue_full", retry_after_s=2.5)
LOST = NodeLost("decode-0 is gone", stage="decode", node="decode-0")
FAULTS = {"full": (0, FULL), "lost": (2, LOST)}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(make_byte_level(path))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> EchoEngine:
    return EchoEngine(tokenizer, FAULTS)


@asynccontextmanager
async def running(engine: EchoEngine, **settings) -> AsyncIterator[str]:
    server, port = await serve(create_app(engine, model_name="echo", **settings), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop()


@pytest.fixture
async def url(engine: EchoEngine) -> AsyncIterator[str]:
    async with running(engine) as address:
        yield address


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


async def events(http: httpx.AsyncClient, path: str, body: dict[str, object]) -> list[dict[str, object] | str]:
    """All server-sent events of a stream; "[DONE]" stays text."""
    response = await http.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


async def test_completion_by_the_openai_client(client, tokenizer):
    ids = tokenizer.encode("Hello, world")
    answer = await client.completions.create(model="echo", prompt="Hello, world", max_tokens=len(ids), logprobs=2, temperature=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("Hello, world", "length")
    assert choice.logprobs.tokens == [tokenizer.token_text(i) for i in ids]
    assert choice.logprobs.text_offset == [len("".join(choice.logprobs.tokens[:i])) for i in range(len(ids))]
    assert choice.logprobs.token_logprobs == [-0.25] * len(ids)
    assert all(
        len(top) == 2 and top[token] == -0.25 for top, token in zip(choice.logprobs.top_logprobs, choice.logprobs.tokens, strict=True)
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (len(ids), len(ids), 2 * len(ids))
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.id.startswith("cmpl-") and answer.model == "echo" and answer.object == "text_completion"


async def test_completion_stream_by_the_openai_client(client, tokenizer):
    ids = tokenizer.encode("naïve 🙂")
    stream = await client.completions.create(
        model="echo", prompt="naïve 🙂", max_tokens=len(ids), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks) == len(ids) + 1, "one event per token, also where it has no text, and one for usage"
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "naïve 🙂"
    assert "" in [chunk.choices[0].text for chunk in chunks[:-1]]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(ids) - 1) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_chat_by_the_openai_client(client, tokenizer):
    ids = tokenizer.render_chat(HI)
    answer = await client.chat.completions.create(
        model="echo", messages=HI, n=2, logprobs=True, top_logprobs=3, max_completion_tokens=5, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant" and choice.finish_reason == "length"
        assert choice.message.content == tokenizer.decode(ids[:5])
        assert [item.token for item in choice.logprobs.content] == [tokenizer.token_text(i) for i in ids[:5]]
        assert [bytes(item.bytes) for item in choice.logprobs.content] == [tokenizer.token_bytes(i) for i in ids[:5]]
        assert all(len(item.top_logprobs) == 3 for item in choice.logprobs.content)
    assert answer.usage.completion_tokens == 10 and answer.id.startswith("chatcmpl-")


async def test_chat_stream_by_the_openai_client(client, tokenizer):
    stream = await client.chat.completions.create(
        model="echo", messages=HI, n=2, stream=True, max_tokens=4, logprobs=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content, mine[0].logprobs) == ("assistant", "", None)
        assert "".join(choice.delta.content for choice in mine[1:]) == tokenizer.decode(tokenizer.render_chat(HI)[:4])
        assert [choice.finish_reason for choice in mine] == [None] * 4 + ["length"]
        assert all(len(choice.logprobs.content) == 1 for choice in mine[1:])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


async def test_chat_ends_at_an_eos_token_and_at_a_stop_string(client):
    answer = await client.chat.completions.create(model="echo", messages=HI)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "user\nhi")
    assert answer.choices[0].model_extra["stop_reason"] is None, "it ended by itself"
    answer = await client.chat.completions.create(model="echo", messages=HI, extra_body={"stop_token_ids": [2]})
    assert (answer.choices[0].finish_reason, answer.choices[0].model_extra["stop_reason"]) == ("stop", 2)
    answer = await client.chat.completions.create(model="echo", messages=HI, stop=["r\nh"])
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "use")
    assert answer.choices[0].model_extra["stop_reason"] == "r\nh"


async def test_several_prompts_are_numbered_prompt_by_prompt(http, engine):
    prompts = ["one", "two e", "three three"]
    body = {"prompt": prompts, "n": 2, "max_tokens": 30, "stop": "e", "return_token_ids": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in answer["choices"][::2]] == ["on", "two ", "thr"]
    lengths = [len(engine.tokenizer.encode(prompt)) for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert [len(choice["prompt_token_ids"]) for choice in answer["choices"][::2]] == lengths
    streamed = await events(http, "/v1/completions", body)
    for choice in answer["choices"]:
        parts = [event["choices"][0] for event in streamed[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert ["prompt_token_ids" in part for part in parts] == [True] + [False] * (len(parts) - 1)


async def test_echo_token_ids_and_continuous_usage(http, tokenizer):
    ids = list(tokenizer.encode("abc def"))
    answer = (await http.post("/v1/completions", json={"prompt": "abc def", "max_tokens": 1, "echo": True})).json()
    assert answer["choices"][0]["text"] == "abc def" + tokenizer.decode(ids[:1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = await events(http, "/v1/completions", {"prompt": ids, "max_tokens": 3, "stream_options": options})
    counted = [(event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]) for event in streamed[:-1]]
    assert counted == [(len(ids), 1), (len(ids), 2), (len(ids), 3), (len(ids), 3)]
    chat = (await http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2, "return_token_ids": True})).json()
    assert chat["prompt_token_ids"] == list(tokenizer.render_chat(HI)) and chat["choices"][0]["token_ids"] == chat["prompt_token_ids"][:2]


async def test_native_generate(http, tokenizer):
    ids = list(tokenizer.encode("hello"))
    answer = (await http.post("/generate", json={"text": "hello", "sampling_params": {"max_new_tokens": len(ids)}, "rid": "r1"})).json()
    assert (answer["text"], answer["output_ids"]) == ("hello", ids)
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": len(ids)} and meta["e2e_latency"] >= 0
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == ("r1", len(ids), len(ids), 1)
    body = {"input_ids": [ids, ids], "sampling_params": {"max_new_tokens": 2, "n": 2}, "return_logprob": True, "top_logprobs_num": 2}
    answers = (await http.post("/generate", json=body | {"return_text_in_logprobs": True})).json()
    assert len(answers) == 4 and all(answer["output_ids"] == ids[:2] for answer in answers)
    logprobs = answers[0]["meta_info"]
    assert logprobs["output_token_logprobs"] == [[-0.25, i, tokenizer.token_text(i)] for i in ids[:2]]
    assert [len(top) for top in logprobs["output_top_logprobs"]] == [2, 2] and logprobs["input_token_logprobs"] == []
    one = (await http.post("/generate", json={"text": "hello", "sampling_params": {"stop": "lo", "max_new_tokens": 9}})).json()
    assert (one["text"], one["meta_info"]["finish_reason"]) == ("hel", {"type": "stop", "matched": "lo"})


async def test_native_stream_is_cumulative(http, tokenizer):
    ids = list(tokenizer.encode("hello there"))
    streamed = await events(http, "/generate", {"text": "hello there", "sampling_params": {"max_new_tokens": len(ids)}})
    assert streamed[-1] == "[DONE]"
    assert [event["output_ids"] for event in streamed[:-1]] == [ids[: i + 1] for i in range(len(ids))]
    assert [event["text"] for event in streamed[:-1]] == [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    assert all(event["meta_info"]["prompt_tokens"] == len(ids) for event in streamed[:-1])
    assert [event["meta_info"]["finish_reason"] is None for event in streamed[:-1]] == [True] * (len(ids) - 1) + [False]
    several = await events(http, "/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 1}})
    assert sorted(event["index"] for event in several[:-1]) == [0, 1]


async def test_an_error_before_the_first_token_has_a_status(http, client):
    for stream in (False, True):
        response = await http.post("/v1/completions", json={"prompt": "full", "stream": stream})
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        error = response.json()["error"]
        assert error["message"] == FULL.message and error["retryable"] is True
        assert (error["type"], error["code"], error["stage"]) == ("rate_limit_error", "queue_full", "admission")
    with pytest.raises(openai.RateLimitError, match="may wait"):
        await client.completions.create(model="echo", prompt="full")


async def test_an_error_in_a_stream_is_its_last_event(http, client):
    streamed = await events(http, "/v1/completions", {"prompt": "lost", "max_tokens": 9})
    assert len(streamed) == 4 and streamed[-1] == "[DONE]"
    assert (streamed[2]["error"]["code"], streamed[2]["error"]["node"]) == ("node_lost", "decode-0")
    with pytest.raises(openai.APIError, match="decode-0 is gone"):
        async for _ in await client.completions.create(model="echo", prompt="lost", max_tokens=9, stream=True):
            pass
    assert (await http.post("/v1/completions", json={"prompt": "lost"})).status_code == 503


async def test_one_failing_prompt_ends_the_others(http, engine):
    response = await http.post("/v1/completions", json={"prompt": ["forever", "lost", "fine"], "max_tokens": 5})
    assert response.status_code == 503
    first, second, third = (request.request_id for request in engine.requests)
    assert {(first, "cancelled"), (second, "node_lost")} < set(engine.ended) and len(engine.ended) == 3
    assert (first.removesuffix(".0"), second.removesuffix(".1")) == (third.removesuffix(".2"),) * 2


async def test_prompts_that_fail_at_once_are_one_error(http, caplog):
    assert (await http.post("/v1/completions", json={"prompt": ["full", "full", "full"]})).status_code == 429
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_an_error_names_the_field_and_the_template_hears_the_client(http, tokenizer):
    response = await http.post("/v1/chat/completions", json={"messages": HI, "temperature": -1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")
    response = await http.post("/v1/chat/completions", json={"messages": HI, "chat_template_kwargs": {"messages": []}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert (await http.post("/v1/completions", json={"prompt": "full"})).json()["error"]["param"] is None
    body = {"messages": HI, "max_tokens": 2, "chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True}
    assert (await http.post("/v1/chat/completions", json=body)).json()["prompt_token_ids"] == list(tokenizer.render_chat(HI))


@pytest.mark.parametrize("body", [{"prompt": "forever"}, {"prompt": ["forever", "forever"]}, {"prompt": "forever", "stream": True}])
async def test_a_client_that_leaves_cancels_its_request(url, engine, body):
    num_prompts = 2 if isinstance(body["prompt"], list) else 1
    async with httpx.AsyncClient(base_url=url, timeout=30) as leaving:
        request = asyncio.create_task(leaving.post("/v1/completions", json=body))
        await engine.until(num_requests=num_prompts, num_ended=0)
        assert engine.ended == []
        request.cancel()
        await asyncio.wait([request])
    await engine.until(num_requests=num_prompts, num_ended=num_prompts)
    assert {how for _, how in engine.ended} == {"cancelled"}


async def test_a_client_that_does_not_read_is_cancelled(engine):
    async with running(engine, slow_client_s=0.2) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            stuck.connect((host, int(port)))
            body = json.dumps({"text": "x " * 100, "sampling_params": {"max_new_tokens": 10**6, "ignore_eos": True}, "stream": True})
            stuck.sendall(f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            await engine.until(num_requests=1, num_ended=1)
    assert [how for _, how in engine.ended] == ["slow_client"]


async def test_a_body_that_does_not_arrive_is_given_up(engine):
    async with running(engine, slow_client_s=0.2) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        answer = (await reader.read()).decode()  # to the end: the connection is closed as well
        writer.close()
    assert answer.startswith("HTTP/1.1 400") and "did not arrive within 0.2 s" in answer
    assert engine.requests == []


async def test_keys(engine):
    async with running(engine, api_keys=("first", "second")) as url, httpx.AsyncClient(base_url=url) as http:
        for path in ("/health", "/metrics"):
            assert (await http.get(path)).status_code == 200
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}, {"Authorization": "Bearer"}):
            response = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await http.get("/v1/models", headers=headers)).status_code == 401
        for key in ("first", "second"):
            response = await http.post("/generate", json={"text": "x"}, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200
    assert len(engine.requests) == 2


async def test_bad_bodies_cost_nothing(http, engine):
    bad = [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000]
    bad += [json.dumps({"prompt": "x"} | extra).encode() for extra in ({"n": 0}, {"n": 129}, {"temperature": -1}, {"logit_bias": {"1": 1}})]
    for body in bad:
        response = await http.post("/v1/completions", content=body)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error"), body[:80]
    assert engine.requests == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_refused(http, engine, chunked):
    size = 10 * 2**20

    async def parts():
        for _ in range(size // 2**16):
            yield b" " * 2**16

    response = await http.post("/v1/completions", content=parts() if chunked else b" " * size)
    assert response.status_code == 413 and "8388608 bytes" in response.json()["error"]["message"]
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    assert len(engine.requests) == 1


@pytest.mark.parametrize("declared", [False, True])
async def test_an_endless_body_is_cut_off(engine, declared):
    async with running(engine, max_body_bytes=1000) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        length = "Content-Length: 100000" if declared else "Transfer-Encoding: chunked"
        writer.write(f"POST /generate HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        if not declared:
            writer.write(b"3e9\r\n" + b" " * 1001 + b"\r\n")
            writer.write(b"f00\r\n" + b" " * 3840 + b"\r\n")
        answer = (await reader.read()).decode()
        writer.close()
    assert answer.startswith("HTTP/1.1 413") and "connection: close" in answer.lower() and "at most 1000 bytes" in answer


async def test_models_health_and_metrics(http, engine, client):
    assert (await http.get("/health")).json() == {}
    models = (await client.models.list()).data
    assert [(model.id, model.owned_by, model.model_extra["max_model_len"]) for model in models] == [("echo", "baton", MAX_MODEL_LEN)]
    assert (await client.models.retrieve("echo")).id == "echo"
    assert (await http.get("/v1/models/a/b")).json()["error"]["code"] == "model_not_found"
    engine.is_ready = False
    response = await http.get("/health?verbose")
    assert response.status_code == 503 and "proven" in response.json()["reason"] and response.json()["pairs"][0]["proven"] is False
    engine.is_ready = True
    assert (await http.get("/health?verbose")).json()["status"] == "ready"
    metrics = await http.get("/metrics")
    assert metrics.headers["content-type"] == CONTENT_TYPE and "baton_requests_running 0.0" in metrics.text


async def test_flushing_caches(http):
    assert (await http.post("/flush_cache")).json() == (await http.post("/flush_cache?node=prefill-0")).json() == {"groups": 1, "blocks": 7}
    response = await http.post("/flush_cache", params={"node": "prefill-9"})
    assert response.status_code == 404 and "known are prefill-0" in response.json()["error"]["message"]
    assert (await http.get("/flush_cache")).status_code == 405


async def test_unknown_model_path_and_method(http):
    response = await http.post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert (await http.get("/nothing")).json()["error"]["type"] == "not_found_error"
    response = await http.get("/generate")
    assert response.status_code == 405 and response.headers["allow"] == "POST" and "GET /generate" in response.json()["error"]["message"]


async def test_request_ids_and_deadlines(http, engine):
    headers = {"X-Request-Id": "mine-1", "X-Request-Timeout-S": "2.5"}
    response = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
    assert (engine.requests[0].request_id, engine.requests[0].timeout_s) == ("mine-1", 2.5)
    assert len((await http.get("/health")).headers["x-request-id"]) == 32
    for wrong in (
        {"X-Request-Id": "a b"},
        {"X-Request-Id": "a" * 129},
        *({"X-Request-Timeout-S": t} for t in ("0", "-1", "nan", "1e9", "")),
    ):
        response = await http.post("/v1/completions", json={"prompt": "x"}, headers=wrong)
        assert response.status_code == 400 and next(iter(wrong)) in response.json()["error"]["message"]


async def test_without_a_socket(engine):
    transport = httpx.ASGITransport(create_app(engine, model_name="echo"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = (await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2})).json()
        assert answer["usage"]["completion_tokens"] == 2


async def test_a_bug_answers_500_and_is_logged(engine, caplog):
    async with running(EchoEngine(None, {})) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1/completions", json={"prompt": "x"})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "AttributeError" in caplog.text


async def test_a_port_in_use_is_named(engine):
    async with running(engine) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            await serve(create_app(engine, model_name="echo"), "127.0.0.1", port)


async def test_stopping_ends_a_request_that_would_not_end(engine):
    async with httpx.AsyncClient(timeout=30) as http:
        server, port = await serve(create_app(engine, model_name="echo"), "127.0.0.1", 0, grace_s=1)
        request = asyncio.create_task(http.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "forever"}))
        await engine.until(num_requests=1, num_ended=0)
        await server.stop()
        await asyncio.wait([request])
    assert [how for _, how in engine.ended] == ["cancelled"]
