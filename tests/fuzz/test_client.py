"""The clients of baton.v1 against something that is no router: whatever it says, they return what was said or raise one of our errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from baton.client import Client, SyncClient
from baton.errors import BatonError, Incompatible
from baton.v1 import inference_pb2
from tests.fuzz.hostile import PATIENCE_S, effort, messages, near, noise
from tests.fuzz.scripted import Liar

CHUNK = inference_pb2.GenerateChunk(
    text="a", token_ids=[1], finish_reason=1, usage=inference_pb2.Usage(prompt_tokens=1, completion_tokens=1)
)
CARDS = inference_pb2.ModelsReply(models=[inference_pb2.ModelCard(name="echo", max_model_len=9, dtype="float32")])


@pytest.fixture
async def liar() -> AsyncIterator[Liar]:
    made = Liar()
    made.hangs_up = True
    await made.start()
    yield made
    await made.stop()


def lines() -> st.SearchStrategy[list[bytes]]:
    words: list[Message] = [CHUNK, CARDS]
    overdone = st.sampled_from(words).flatmap(near) | messages(inference_pb2.GenerateChunk)
    spoilt = st.sampled_from(words).flatmap(lambda word: noise(word.SerializeToString()))
    return st.lists(overdone.map(lambda message: message.SerializeToString()) | spoilt, max_size=3)


@effort(30)
@given(said=lines())
async def test_a_client_raises_nothing_but_our_errors(liar: Liar, said: list[bytes]) -> None:
    liar.lines = said
    async with asyncio.timeout(PATIENCE_S), Client(liar.address) as client:
        for call in (
            client.complete("x"),
            client.models(),
            client.status(),
            client.flush_cache(),
            client.drain("n", 1.0),
            client.restore("n"),
        ):
            with contextlib.suppress(BatonError):
                await call


@effort(10)
@given(said=lines())
async def test_so_does_a_blocking_one(liar: Liar, said: list[bytes]) -> None:
    def talk() -> None:
        with SyncClient(liar.address) as client:
            for call in (lambda: client.complete("x"), client.models, client.status, client.flush_cache):
                with contextlib.suppress(BatonError):
                    call()

    liar.lines = said
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(talk)


async def test_bytes_that_are_no_message_are_named_as_such(liar: Liar) -> None:
    liar.lines = [b"\xff\xff"]
    async with Client(liar.address) as client:
        with pytest.raises(Incompatible, match=r"does it speak baton\.v1"):
            await client.complete("x")
        with pytest.raises(Incompatible, match=r"does it speak baton\.v1"):
            await client.models()
