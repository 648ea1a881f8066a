"""What an answer is pushed into: works side by side, chunks taken one by one, and a client that does not take them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from baton.errors import BatonError, Cancelled, NodeLost
from baton.request import Chunk
from router.sink import Sink, iterated, side_by_side


def chunk(number: int) -> Chunk:
    return Chunk("r", 0, str(number))


async def test_works_end_together_and_the_first_error_ends_the_others() -> None:
    ended: list[str] = []

    async def work(name: str, seconds: float, error: BatonError | None = None) -> None:
        try:
            await asyncio.sleep(seconds)
            if error is not None:
                raise error
            ended.append(name)
        except asyncio.CancelledError:
            ended.append(f"{name} cancelled")
            raise

    await side_by_side([work("alone", 0.0)])
    await side_by_side([work("long", 0.01), work("short", 0.0)])
    assert ended == ["alone", "short", "long"]
    ended.clear()
    with pytest.raises(NodeLost):
        await side_by_side([work("endless", 3600), work("wrong", 0.0, NodeLost("gone")), work("as wrong", 0.0, NodeLost("gone"))])
    assert ended == ["endless cancelled"]


async def test_an_iterator_gives_all_chunks_then_the_error() -> None:
    async def answer(sink: Sink) -> None:
        for number in range(3):
            if not sink.put(chunk(number)):
                await sink.room()
        sink.put(chunk(3))
        raise NodeLost("gone")

    seen: list[str] = []
    with pytest.raises(NodeLost):
        async for item in iterated(answer, 10.0):
            seen.append(item.text)
    assert seen == ["0", "1", "2", "3"]


async def test_leaving_an_iterator_cancels_the_answer() -> None:
    cancelled = asyncio.Event()

    async def answer(sink: Sink) -> None:
        sink.put(chunk(0))
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    async with aclosing(iterated(answer, 10.0)) as chunks:
        await anext(chunks)
    assert cancelled.is_set()


async def test_a_chunk_that_nobody_takes_ends_the_answer() -> None:
    async def answer(sink: Sink) -> None:
        sink.put(chunk(0))
        await asyncio.sleep(0)
        assert not sink.put(chunk(1))
        await sink.room()

    async with aclosing(iterated(answer, 0.05)) as chunks:
        assert (await anext(chunks)).text == "0"
        await asyncio.sleep(0.2)
        with pytest.raises(Cancelled) as caught:
            await anext(chunks)
    assert caught.value.cause == "slow_client"
