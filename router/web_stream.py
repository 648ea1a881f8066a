"""Carrying an answer to an HTTP client that may go away or stop reading. Knows ASGI; knows no format and no router.

A stream ends in one of four ways: after its last event; with an error event when the router gives up; by the client's
disconnect; or because the client did not read for `slow_client_s`. In all of them the source is closed, which cancels the request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError, InternalError
from baton.request import Chunk
from router.web_answers import DONE, AnswerFormat, error_json, event

log = logging.getLogger(__name__)

T = TypeVar("T")
Numbered = tuple[int, Chunk]


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client goes away first, `work` is cancelled and awaited, and ClientDisconnect raised.

    `work` brings a deadline of its own: every request has one.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task)
        await _end(watch)


async def merged(sources: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[Numbered, None]:
    """Chunks of all sources as they come, each with its source's number. Closes them all when it ends, or when one fails."""
    pending = {asyncio.create_task(_next(source)): number for number, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                chunk = task.result()
                number = pending.pop(task)
                if chunk is not None:
                    pending[asyncio.create_task(_next(sources[number]))] = number
                    yield number, chunk
    finally:
        for task in pending:
            await _end(task)
        for source in sources:
            await source.aclose()


async def alone(source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Numbered, None]:
    """One source in the form of `merged`, without a task for every chunk."""
    async with aclosing(source):
        async for chunk in source:
            yield 0, chunk


async def gathered(chunks: AsyncGenerator[Numbered, None], answer: AnswerFormat) -> None:
    """Give all chunks to an answer that is sent as a whole."""
    async with aclosing(chunks):
        async for number, chunk in chunks:
            answer.take(number, chunk)


async def event_bytes(chunks: AsyncGenerator[Numbered, None], answer: AnswerFormat) -> AsyncGenerator[bytes, None]:
    """The server-sent events of a stream. An error before the first one is raised, so that it gets an HTTP status of its own."""
    started = False
    try:
        async with aclosing(chunks):
            async for number, chunk in chunks:
                # One write per chunk: what a chunk gives rise to leaves in one packet.
                yield b"".join(event(content) for content in answer.events(number, chunk))
                started = True
        yield b"".join(event(content) for content in answer.closing()) + DONE
    except BatonError as error:
        if not started:
            raise
        yield event(error_json(error)) + DONE
    except Exception:  # an edge: the status line is gone, so the client learns of a bug here or never
        if not started:
            raise
        log.exception("a stream ended in a bug")
        yield event(error_json(InternalError("a bug in the router ended this stream; its log has the details"))) + DONE


class EventStream(Response):
    """Sends events as they come; the status line waits for the first one. Owns `events` and closes it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], slow_client_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._slow_client_s = slow_client_s
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client goes away."""
        with suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            started = False
            async for content in events:
                if not started:
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    started = True
                if not await self._sent(send, content):
                    return
        await self._sent(send, b"", more=False)

    async def _sent(self, send: Send, content: bytes, more: bool = True) -> bool:
        try:
            async with asyncio.timeout(self._slow_client_s):
                await send({"type": "http.response.body", "body": content, "more_body": more})
        except TimeoutError:
            log.warning("cancelling a stream: its client has not read for %g s", self._slow_client_s)
            return False
        return True


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _next(source: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(source, None)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it. Of earlier errors the first was told by whoever awaited it; a new one is a bug, so it is logged."""
    if task.done():
        if not task.cancelled():
            task.exception()  # counts as seen: of several prompts refused at once, one answers for all
        return
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is not None:
        log.error("a cancelled task failed", exc_info=task.exception())
