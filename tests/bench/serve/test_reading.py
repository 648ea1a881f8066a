"""Responses are read the same however the network cuts them: framing, events, tokens, usage, errors; and junk is refused in words."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.answers import Answer
from bench.serve.asks import Ask
from bench.serve.http_reader import ResponseReader
from bench.serve.sse import Events


def event(content: object, spaces: bool = False) -> bytes:
    return b"data: " + json.dumps(content, separators=None if spaces else (",", ":")).encode() + b"\n\n"


def token(text: str) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None}


def delta(**said: str) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "delta": said}]}


USAGE = {"id": "x", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}}
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
# Text that looks like what the reader searches for.
TEXTS = ["a", "", '"choices":[{', 'data: {"error": 1}\n\n', '"role":"user"', "\u2028\r\n", "🙂"]


def cut(data: bytes, at: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(i, len(data)) for i in at), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


def chunked(body: bytes, at: list[int]) -> bytes:
    parts = [part for part in cut(body, at) if part]
    return b"".join(b"%x\r\n" % len(part) + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


def read(pieces: list[bytes]) -> tuple[ResponseReader, bytes]:
    body: list[bytes] = []
    reader = ResponseReader(body.append)
    for piece in pieces:
        reader.feed(piece)
    return reader, b"".join(body)


CUTS = st.lists(st.integers(0, 900), max_size=12)


@given(st.binary(min_size=1, max_size=300), CUTS, CUTS, st.booleans())
def test_a_body_comes_out_whole_however_it_is_cut(body, chunk_cuts, cuts, in_chunks):
    framed = (
        b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, chunk_cuts) if in_chunks else b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    reader, got = read(cut(HEAD + framed, cuts))
    assert got == body and reader.done and reader.reusable and reader.status == 200


def test_bodies_that_end_with_the_connection():
    reader, got = read([HEAD + b"\r\nabc", b"def"])
    assert got == b"abcdef" and not reader.done and reader.end() and not reader.reusable
    reader, _ = read([HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"])
    assert not reader.end(), "it broke off"
    reader, _ = read([b"HTTP/1.1 429 Too Many\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"])
    assert (reader.status, reader.done, reader.reusable) == (429, True, False)


@pytest.mark.parametrize(
    "junk",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 what\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
        HEAD + b"Content-Length: 1\r\n\r\nabc",
        b"x" * 70000,
    ],
)
def test_what_is_no_response_is_refused(junk):
    with pytest.raises(ValueError, match=r"."):
        read([junk])


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6), CUTS, st.booleans(), st.booleans(), st.booleans())
def test_every_token_is_one_event_however_it_is_cut(texts, cuts, chat, spaces, with_text):
    tokens = [delta(content=text) if chat else token(text) for text in texts]
    greeting = [delta(role="assistant", content="")] if chat else []
    stream = b": ping\n\n" + b"".join(event(said, spaces) for said in [*greeting, *tokens, USAGE]) + DONE
    answer = Answer(Ask("x", 5, 9), 0.0)
    events = Events(answer, with_text=with_text)
    for number, piece in enumerate(cut(stream, cuts)):
        events.feed(piece, float(number))
    assert len(answer.token_s) == len(texts) and answer.token_s == sorted(answer.token_s)
    assert (answer.prompt_len, answer.output_len) == (5, 3)
    assert answer.texts == (texts if with_text else [])


def test_a_greeting_with_text_is_a_token_and_crlf_is_a_line_end():
    answer = Answer(Ask("x", 5, 9), 0.0)
    Events(answer).feed((event(delta(role="assistant", content="Hi")) + event(delta(content="!"))).replace(b"\n", b"\r\n"), 1.0)
    assert len(answer.token_s) == 2


@pytest.mark.parametrize("said", [b"data: 7\n\n", b"data: {\n\n", event({"error": {"message": "the node is gone"}})])
def test_an_error_in_the_stream_is_told(said):
    with pytest.raises(ValueError, match=r"."):
        Events(Answer(Ask("x", 5, 9), 0.0)).feed(said, 1.0)
