"""The HTTP door over raw sockets: bodies, heads and bytes that no good client would send.

Whatever comes, the answer is one that HTTP has for it, no bug of ours shows, and a good request is served afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.conftest import Running
from tests.fuzz.hostile import PATIENCE_S, effort, no_alarms, noise

ALLOWED = {200, 400, 404, 405, 413, 429, 504}  # 504: some ask for a millisecond
ASKED = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/generate": {"text": "abc", "sampling_params": {"max_new_tokens": 2}},
}
FIELDS = [
    *("prompt", "messages", "text", "input_ids", "model", "n", "stream", "stream_options", "max_tokens", "min_tokens", "seed", "stop"),
    *("temperature", "top_k", "top_p", "min_p", "logprobs", "top_logprobs", "echo", "stop_token_ids", "logit_bias", "best_of", "rid"),
    *("chat_template_kwargs", "sampling_params", "return_logprob", "return_text_in_logprobs", "top_logprobs_num", "skip_special_tokens"),
    *("max_new_tokens", "min_new_tokens", "sampling_seed", "return_token_ids", "role", "content", "type", "name", "ignore_eos"),
]
EDGES = [0, -1, 1, 3, 5, 129, 2**31, 2**63, 2**64, -(2**70), 1e308, 1e-320, 0.5, "", "a" * 2000, "\0", "😀", None, True, [], {}, [[]], [""]]
RAW = [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 500 + b"]" * 500, b'{"a":1,"a":2}', b'"\xff"', b"01", b"\x00"]
JSON = st.recursive(
    st.sampled_from(EDGES) | st.integers(-3, 300) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body that is nearly what is asked for there."""
    path = draw(st.sampled_from(list(ASKED)))
    content: dict[str, Any] = ASKED[path] | draw(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
    raw = json.dumps(content).encode()
    return path, draw(st.just(raw) | st.just(_with(raw, draw(st.sampled_from(RAW)))) | noise(raw))


def _with(raw: bytes, value: bytes) -> bytes:
    return raw[:-1] + b', "temperature": ' + value + b"}"


HEADERS = [
    *(
        b"X-Request-Id: a b",
        b"X-Request-Id: " + b"a" * 300,
        b"X-Request-Id: \xff",
        b"X-Request-Timeout-S: nan",
        b"X-Request-Timeout-S: 1e9",
    ),
    *(
        b"X-Request-Timeout-S: 0.001",
        b"Authorization: Bearer \xe9",
        b"Host: [",
        b"Host: a:b:c",
        b"Content-Encoding: gzip",
        b"Expect: 100-continue",
    ),
    *(b"Upgrade: websocket", b"Upgrade: h2c", b"Connection: upgrade", b"Content-Length: 5", b"Content-Length: -5", b"Content-Length: 1_0"),
    *(b"Content-Length: 99999999999999999999", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Cookie: " + b"c" * 20_000),
    *(b"X: \0", b"no colon", b" folded", b"Content-Type: application/xml", b"\r\n", b"X" * 100 + b": y\r\n" * 200),
]
PATHS = [
    b"*",
    b"/%ff%fe",
    b"/v1/models/" + b"a" * 3000,
    b"http://[/x",
    b"//",
    b"/health?%00&verbose",
    b"/flush_cache?node=%00",
    b"/metrics?a=b",
    b"/..%2f",
]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A whole request, perhaps with one thing in its head that should not be there."""
    path, body = draw(bodies())
    method = draw(st.sampled_from([b"POST"] * 6 + [b"GET", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT", b"X" * 100]))
    target = draw(st.sampled_from([path.encode()] * 4 + PATHS))
    heads = [b"Host: x", b"Connection: close", b"Content-Length: %d" % len(body), *draw(st.lists(st.sampled_from(HEADERS), max_size=2))]
    raw = method + b" " + target + b" HTTP/1.1\r\n" + b"\r\n".join(heads) + b"\r\n\r\n" + body
    return draw(st.just(raw) | noise(raw))


async def exchange(port: int, raw: bytes, whole: bool = True) -> bytes:
    """What is answered to these bytes. whole: something must be; else no answer after a moment means that too little was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    with contextlib.suppress(ConnectionError):
        writer.write(raw)
        if not whole:
            answer = await some(reader, 0.1)
            writer.write_eof()
        while more := await some(reader, PATIENCE_S):
            answer += more
    writer.close()
    return answer


async def some(reader: asyncio.StreamReader, seconds: float) -> bytes:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await reader.read(65536)
    assert seconds < PATIENCE_S, "the server neither answers nor hangs up"
    return b""


async def is_well(router: Running) -> bool:
    body = json.dumps(ASKED["/v1/completions"]).encode()
    good = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    answers = [
        await exchange(router.http_port, good),
        await exchange(router.http_port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
    ]
    return all(answer.startswith(b"HTTP/1.1 200") for answer in answers) and b'"completion_tokens":2' in answers[0]


@effort(4)
@given(batch=st.lists(requests(), min_size=20, max_size=40))
async def test_any_request_is_answered_by_the_rules(router: Running, batch: list[bytes]) -> None:
    with no_alarms():
        answers = await asyncio.gather(*(exchange(router.http_port, raw, whole=False) for raw in batch))
        for raw, answer in zip(batch, answers, strict=True):
            statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+)", answer, re.MULTILINE)]
            assert set(statuses) <= ALLOWED | {100}, (raw, answer[:500])
            assert not any(word in answer for word in (b"a bug in the router", b"Internal Server Error")), (raw, answer[-500:])
        assert await is_well(router)


@effort(2)
@given(batch=st.lists(bodies(), min_size=20, max_size=40), cuts=st.lists(st.integers(1, 60), min_size=1, max_size=5))
async def test_any_body_in_chunks_is_answered_or_refused(router: Running, batch: list[tuple[str, bytes]], cuts: list[int]) -> None:
    def chunked(path: str, body: bytes) -> bytes:
        parts = [body[at : at + cuts[0]] for at in range(0, len(body), cuts[0])]
        framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + framed

    with no_alarms():
        answers = await asyncio.gather(*(exchange(router.http_port, chunked(*each)) for each in batch))
        for each, answer in zip(batch, answers, strict=True):
            assert int(answer.split(b" ")[1]) in ALLOWED, (each, answer[:500])
        assert await is_well(router)
