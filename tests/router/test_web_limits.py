"""The HTTP front against clients that are many, slow, malformed or too much: each refused early, counted, and nobody else harmed."""

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from baton.errors import Unavailable
from baton.telemetry import Refusals
from baton.tokenizer import Tokenizer
from router.web import create_app
from router.web_middleware import MAX_HEADERS
from router.web_server import serve
from tests.router.echo_engine import EchoEngine
from tests.tiny_tokenizers import make_byte_level

LATER = Unavailable("decode-1 is being rebuilt", stage="router", cause="no_nodes", retry_after_s=7.2)
GOOD = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(make_byte_level(path))


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes to the end of the connection, also if that is a reset: the server closes it with bytes of ours unread."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65536):
            received += part
    return received


class Front:
    """A front with its engine, its book of refusals and its address."""

    def __init__(self, engine: EchoEngine) -> None:
        self.engine = engine
        self.refusals = Refusals("http", logging.getLogger("test"))
        self.port = 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def raw(self, *parts: bytes) -> bytes:
        """What comes back, to the end of the connection, for bytes sent in these parts."""
        reader, writer = await self.connect()
        with contextlib.suppress(ConnectionError):  # what it said before is still there
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
        answer = await everything(reader)
        writer.close()
        return answer

    async def is_well(self) -> bool:
        answer = await self.raw(post("/v1/completions", GOOD, b"Connection: close\r\n"))
        return answer.startswith(b"HTTP/1.1 200") and b'"completion_tokens":2' in answer


def post(path: str, body: bytes, more: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode() + more + b"\r\n" + body


@asynccontextmanager
async def running(tokenizer: Tokenizer, *, max_connections: int = 100, head_s: float = 20.0, **settings) -> AsyncIterator[Front]:
    front = Front(EchoEngine(tokenizer, {"later": (0, LATER)}))
    app = create_app(front.engine, model_name="echo", refusals=front.refusals, **settings)
    server, front.port = await serve(
        app, "127.0.0.1", 0, grace_s=1, refusals=front.refusals, max_connections=max_connections, head_s=head_s
    )
    try:
        async with asyncio.timeout(30):
            yield front
            assert await front.is_well()
    finally:
        await server.stop()


async def test_too_many_exchanges_are_refused_and_health_still_answers(tokenizer):
    async with running(tokenizer, max_exchanges=2) as front, httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}") as http:
        long = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "forever"})) for _ in range(2)]
        await front.engine.until(num_requests=2, num_ended=0)
        response = await http.post("/v1/completions", json={"prompt": "abc"})
        error = response.json()["error"]
        assert (response.status_code, response.headers["retry-after"], error["code"], error["retry_after_s"]) == (
            429,
            "1",
            "exchanges",
            1.0,
        )
        assert "2 HTTP requests are under way here, at most 2" in error["message"] and len(response.headers["x-request-id"]) == 32
        assert (await http.get("/health")).status_code == (await http.get("/metrics")).status_code == 200
        for task in long:
            task.cancel()
        await front.engine.until(num_requests=2, num_ended=2)
    assert front.refusals.counts["exchanges"] == 1


async def test_the_idlest_connections_make_room_and_those_at_work_stay(tokenizer):
    async with running(tokenizer, max_connections=4) as front:
        working = await front.connect()
        working[1].write(post("/generate", json.dumps({"text": "forever"}).encode()))
        await front.engine.until(num_requests=1, num_ended=0)
        idle = [await front.connect() for _ in range(2)]
        idle[1][1].write(b"POST /gen")
        used, writer = await front.connect()
        writer.write(post("/v1/completions", GOOD))
        assert (await used.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        newcomers = [await front.connect() for _ in range(2)]
        assert await idle[0][0].read() == await idle[1][0].read() == b"", "the two that have been idle for longest"
        assert await used.readuntil(b"}}}") and not used.at_eof() and not working[0].at_eof()
        assert front.refusals.counts["connections"] == 2
        for _, each in (working, *idle, (used, writer), *newcomers):
            each.close()
        await front.engine.until(num_requests=1, num_ended=1)


@pytest.mark.parametrize(
    "begun",
    [
        b"G",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Le",
        post("/nowhere", GOOD) + b"POST /generate HTTP/1.1\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{",  # answered before its body has come
    ],
)
async def test_a_head_or_a_rest_that_does_not_come_is_given_up(tokenizer, begun):
    async with running(tokenizer, head_s=0.2) as front:
        reader, writer = await front.connect()
        writer.write(begun)
        trickle = asyncio.create_task(_trickle(writer))
        answer = await everything(reader)
        trickle.cancel()
        writer.close()
        assert (b"404" in answer) == (b"nowhere" in begun)
    assert front.refusals.counts["slow_head"] == 1


async def _trickle(writer: asyncio.StreamWriter) -> None:
    """A client that is never done, and never silent."""
    while True:
        await asyncio.sleep(0.05)
        writer.write(b"x")


async def test_after_a_late_body_has_ended_the_connection_goes_on(tokenizer):
    async with running(tokenizer, head_s=0.3) as front:
        reader, writer = await front.connect()
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na")
        assert b"404" in await reader.readuntil(b"\r\n")
        writer.write(b"bc")
        await asyncio.sleep(0.5)
        writer.write(post("/v1/completions", GOOD, b"Connection: close\r\n"))
        assert b"HTTP/1.1 200" in await reader.read()
        writer.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,  # TLS
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / http\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 10_000,
    ],
)
async def test_what_is_no_http_is_told_so_once(tokenizer, noise, caplog):
    async with running(tokenizer) as front:
        answer = await front.raw(noise)
        assert answer.startswith(b"HTTP/1.1 400") and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "malformed_http"
    assert front.refusals.counts["malformed_http"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


async def test_noise_after_an_answer_has_begun_just_ends_the_connection(tokenizer, caplog):
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with running(tokenizer, api_keys=("secret",)) as front:
        answer = await front.raw(chunked, b"no chunk\r\n")
        assert answer.startswith(b"HTTP/1.1 401") and answer.count(b"HTTP/1.1") == 1
        front.engine.requests.clear()
        front.is_well = lambda: _healthy(front)  # the good request would need the key
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


async def _healthy(front: Front) -> bool:
    return (await front.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_headers_and_encodings_are_limited(tokenizer):
    async with running(tokenizer) as front, httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}") as http:
        response = await http.get("/health", headers={f"x-{i}": "y" for i in range(MAX_HEADERS)})
        assert response.status_code == 400 and f"may have {MAX_HEADERS} headers" in response.json()["error"]["message"]
        bomb = gzip.compress(b'{"prompt": "' + b" " * 10**7 + b'"}')
        response = await http.post("/v1/completions", content=bomb, headers={"Content-Encoding": "gzip"})
        assert response.status_code == 400 and "send the body as it is" in response.json()["error"]["message"]
        assert front.refusals.counts == {"headers": 1, "content_encoding": 1}


async def test_come_back_later_says_when(tokenizer):
    async with running(tokenizer) as front, httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}") as http:
        for stream in (False, True):
            response = await http.post("/v1/completions", json={"prompt": "later", "stream": stream})
            assert (response.status_code, response.headers["retry-after"], response.json()["error"]["retry_after_s"]) == (503, "8", 7.2)
        assert not front.refusals.counts, "that a node is missing is no refusal of a client"


async def test_refusals_of_clients_are_counted_by_their_cause(tokenizer):
    async with running(tokenizer) as front, httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}") as http:
        for path, body in (
            ("/v1/completions", b"{"),
            ("/v1/completions", b'{"prompt": "x", "n": 1000}'),
            ("/v1/completions", b'{"prompt": "x", "model": "other"}'),
            ("/nothing", b"{}"),
        ):
            assert (await http.post(path, content=body)).status_code in (400, 404)
        assert front.refusals.counts == {"invalid_request": 2, "model_not_found": 1, "not_found": 1}
        assert front.engine.requests == []
