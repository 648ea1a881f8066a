"""Where the chunks of an answer go, as they are made. Knows chunks and waiting; no nodes, no HTTP and no gRPC.

An answer is pushed: from the node's message to the client's socket there is no task in between that would have to be woken for every
token. Whoever wants to pull instead takes `iterated`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from baton.errors import Cancelled
from baton.request import Chunk


class Sink(Protocol):
    """One client's side of an answer. State owner: whoever made it, on the router's loop."""

    def put(self, chunk: Chunk) -> bool:
        """Take the next chunk, without waiting. False: the client has left so much unread that the next one should wait for `room`."""

    async def room(self) -> None:
        """Return once the client has caught up. Raises Cancelled (slow_client) if it reads nothing for too long."""


def unread(seconds: float) -> Cancelled:
    """Why a request ends whose client does not read."""
    return Cancelled(f"the client left its stream unread for {seconds:g} s", stage="router", cause="slow_client")


async def side_by_side(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them all to their end. The first one that fails ends the others, which are awaited, and its error is raised."""
    if len(works) == 1:
        await works[0]  # without a task of its own: most answers have one sequence
        return
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # of several that failed, one answers for all


class _Hand:
    """A sink of which chunks are taken one by one; one at a time may lie there. Owner: the `iterated` that made it."""

    def __init__(self, slow_client_s: float) -> None:
        self.chunks: deque[Chunk] = deque()
        self.moved = asyncio.Event()
        self._slow_client_s = slow_client_s
        self._emptied = asyncio.Event()

    def put(self, chunk: Chunk) -> bool:
        self.chunks.append(chunk)
        self.moved.set()
        return False

    def take(self) -> Chunk:
        chunk = self.chunks.popleft()
        if not self.chunks:
            self._emptied.set()
        return chunk

    async def room(self) -> None:
        self._emptied.clear()
        try:
            async with asyncio.timeout(self._slow_client_s):
                while self.chunks:
                    await self._emptied.wait()
        except TimeoutError:
            self.chunks.clear()  # whoever holds the iterator may hold it for long
            raise unread(self._slow_client_s) from None


async def iterated(answer: Callable[[Sink], Awaitable[None]], slow_client_s: float) -> AsyncGenerator[Chunk, None]:
    """The chunks that `answer` gives to its sink; raises what ends it. Close the iterator (aclose) to cancel it.

    slow_client_s: how long the caller may leave a chunk while more are waiting.
    """
    hand = _Hand(slow_client_s)

    async def run() -> None:
        await answer(hand)

    task = asyncio.create_task(run())
    task.add_done_callback(lambda _: hand.moved.set())
    try:
        while not task.done() or hand.chunks:
            while hand.chunks:
                yield hand.take()
            hand.moved.clear()
            if not task.done():
                await hand.moved.wait()  # the answer ends by its deadline
        task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])
