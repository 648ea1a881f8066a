"""Events of a stream: the quick way says what the slow way says, every token has one, and a turn of the loop is one packet."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.request import Chunk, FinishReason, Usage
from baton.tokenizer import Tokenizer
from router.schema import ChatBody, CompletionBody
from router.web import create_app, serve
from router.web_answers import Frame, TextEvents, event
from router.web_openai import ChatAnswer, CompletionAnswer
from router.web_turns import Turns, TurnTransport
from tests.router.echo_engine import EchoEngine
from tests.router.test_web import tokenizer

__all__ = ["tokenizer"]

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(TEXTS, TEXTS, st.booleans())
def test_an_event_of_a_text_is_the_event(name: str, text: str, with_usage: bool) -> None:
    def content(of: str) -> dict[str, Any]:
        return {"model": name, "choices": [{"text": of, "logprobs": None}]} | ({"usage": None} if with_usage else {})

    assert TextEvents(content).event(text) == event(content(text))


def chunks(texts: list[str]) -> list[Chunk]:
    """What an answer is made of: one token each, the last with its reason and the usage."""
    made = [Chunk("r", 0, text, (number,)) for number, text in enumerate(texts)]
    return [*made, Chunk("r", 0, "", (9,), finish_reason=FinishReason.LENGTH, usage=Usage(3, len(texts) + 1))]


def contents(said: bytes) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in said.decode().split("\n\n") if line]


@pytest.mark.parametrize("usage", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
@given(texts=st.lists(TEXTS, max_size=5))
def test_every_token_has_one_event_in_both_interfaces(tokenizer: Tokenizer, usage: dict[str, bool], texts: list[str]) -> None:
    frame = Frame("cmpl-1", 7, "echo", tokenizer, [(1, 2, 3)])
    options = {"stream": True, "stream_options": usage}
    completion = CompletionAnswer(frame, CompletionBody.model_validate({"prompt": [1, 2, 3]} | options))
    chat = ChatAnswer(frame, ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}]} | options))
    for number, piece in enumerate(chunks(texts)):
        (said,) = contents(completion.events(0, piece))
        *hello, chatted = contents(chat.events(0, piece))
        assert len(hello) == (number == 0)
        last = piece.finish_reason is not None
        for told, text in ((said, said["choices"][0]["text"]), (chatted, chatted["choices"][0]["delta"]["content"])):
            (choice,) = told["choices"]
            assert (text, choice["finish_reason"]) == (piece.text, "length" if last else None)
            assert choice["logprobs"] is choice["stop_reason"] is None
            expected = (number + 1 if usage.get("continuous_usage_stats") else None) if usage else "absent"
            counted = told.get("usage", "absent")
            assert (counted["completion_tokens"] if isinstance(counted, dict) else counted) == expected


class Written(asyncio.Transport):
    """A transport that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[bytes] = []
        self.ended = ""

    def write(self, data: Any) -> None:
        self.packets.append(bytes(data))

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


async def test_what_a_turn_brings_is_one_packet() -> None:
    turns, under = Turns(), [Written() for _ in range(3)]
    first, second, third = (TurnTransport(transport, turns) for transport in under)
    first.write(b"head ")
    second.write(b"x")
    first.writelines([b"event ", b"event"])
    assert not under[0].packets
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [transport.packets for transport in under] == [[b"head event event"], [b"x"], []]
    first.write(b"now")
    first.flush()
    second.write(b"last words")
    second.close()
    third.write(b"nobody reads this")
    third.abort()
    await asyncio.sleep(0.01)
    assert [transport.packets[1:] for transport in under] == [[b"now"], [b"last words"], []]
    assert [transport.ended for transport in under] == ["", "closed", "aborted"]
    second.write(b"too late")
    await asyncio.sleep(0.01)
    assert under[1].packets == [b"x", b"last words"]


async def test_the_head_comes_with_the_first_event_and_nothing_waits_for_an_acknowledgement(tokenizer: Tokenizer) -> None:
    server, port = await serve(create_app(EchoEngine(tokenizer, {}), model_name="echo"), "127.0.0.1", 0)
    body = json.dumps({"prompt": "forever", "stream": True, "max_tokens": 9}).encode()
    with socket.socket() as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        packet = await loop.sock_recv(client, 65536)
    assert packet.startswith(b"HTTP/1.1 200") and b"data: {" in packet
    (accepted,) = [connection.transport for connection in server.server_state.connections]
    assert accepted.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await server.stop()


async def test_an_old_client_gets_a_stream_without_chunks(tokenizer: Tokenizer) -> None:
    server, port = await serve(create_app(EchoEngine(tokenizer, {}), model_name="echo"), "127.0.0.1", 0)
    body = json.dumps({"prompt": "abc", "stream": True, "max_tokens": 2}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    head, _, said = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"chunked" not in head.lower()
    assert [len(content["choices"]) for content in contents(said.removesuffix(b"data: [DONE]\n\n"))] == [1, 1]
    writer.close()
    await server.stop()


async def test_a_stream_needs_a_connection_of_this_server(tokenizer: Tokenizer) -> None:
    transport = httpx.ASGITransport(create_app(EchoEngine(tokenizer, {}), model_name="echo"), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/v1/completions", json={"prompt": "abc", "stream": True})).status_code == 500


async def test_a_client_that_leaves_after_a_large_body_is_noticed(tokenizer: Tokenizer) -> None:
    """Its last bytes stop the reading, and nothing is written that could fail."""
    engine = EchoEngine(tokenizer, {})
    server, port = await serve(create_app(engine, model_name="echo"), "127.0.0.1", 0)
    body = json.dumps({"prompt": "forever", "stream": True, "max_tokens": 9, "user": "x" * 300_000}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(30):
        await engine.until(num_requests=1, num_ended=1)
    assert engine.ended[0][1] == "cancelled"
    await server.stop()
