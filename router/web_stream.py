"""Carrying an answer to an HTTP client that may go away or stop reading. Knows ASGI and connections; knows no format and no router.

A stream ends in one of four ways: after its last event; with an error event when the router gives up; by the client's
disconnect; or because the client did not read for `slow_client_s`. In all of them what makes the answer has ended, or is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError, Cancelled, InternalError
from baton.request import Chunk, GenerateRequest
from router.sink import Sink, side_by_side, unread
from router.web_answers import DONE, AnswerFormat, error_json, event
from router.web_connection import Connection, connection_of

log = logging.getLogger(__name__)

T = TypeVar("T")
AnswerOne = Callable[[GenerateRequest, Sink], Coroutine[Any, Any, None]]


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


async def gathered(answer_one: AnswerOne, requests: Sequence[GenerateRequest], answer: AnswerFormat) -> None:
    """Have all requests answered, and give all chunks to an answer that is sent as a whole."""
    await side_by_side([answer_one(request, _Whole(prompt, answer)) for prompt, request in enumerate(requests)])


class _Whole:
    """A sink that keeps all: the client reads nothing before the end."""

    def __init__(self, prompt: int, answer: AnswerFormat) -> None:
        self._prompt = prompt
        self._answer = answer

    def put(self, chunk: Chunk) -> bool:
        self._answer.take(self._prompt, chunk)
        return True

    async def room(self) -> None:
        return


class EventStream(Response):
    """Sends the events of one HTTP request as they come; the status line waits for the first one, so that an error before it has a
    status of its own. Owns what makes the answers, and cancels it if the client goes away.

    An event takes no task and no coroutine from the node's message to the socket: chunks are written where they are made.
    """

    media_type = "text/event-stream"

    def __init__(self, answer_one: AnswerOne, requests: Sequence[GenerateRequest], answer: AnswerFormat, slow_client_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer_one = answer_one
        self._requests = requests
        self._answer = answer
        self._slow_client_s = slow_client_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client goes away."""
        connection = connection_of(scope)
        events = _Events(connection, self._answer, self._slow_client_s)
        sinks = [_Part(events, prompt) for prompt in range(len(self._requests))]
        work = asyncio.create_task(side_by_side(list(map(self._answer_one, self._requests, sinks))))
        work.add_done_callback(lambda _: events.moved.set())
        connection.watch(work.cancel)
        try:
            await events.moved.wait()  # every answer ends by its deadline
            if not events.waiting and not work.cancelled():
                work.result()
            if not work.cancelled():
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                events.begin()
                await asyncio.wait([work])
            if not work.cancelled():
                await self._finish(connection, work.exception(), send)
        finally:
            connection.unwatch()
            await _end(work)

    async def _finish(self, connection: Connection, error: BaseException | None, send: Send) -> None:
        if isinstance(error, Cancelled) and error.cause == unread(0).cause:
            log.warning("cancelling a stream: its client has not read for %g s", self._slow_client_s)
            connection.give_up()
            return
        connection.write_body(self._last_events(error))
        try:
            async with asyncio.timeout(self._slow_client_s):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            connection.give_up()

    def _last_events(self, error: BaseException | None) -> bytes:
        if error is None:
            return b"".join(map(event, self._answer.closing())) + DONE
        if not isinstance(error, BatonError):  # an edge: the status line is gone, so the client learns of a bug here or never
            log.error("a stream ended in a bug", exc_info=error)
            error = InternalError("a bug in the router ended this stream; its log has the details")
        return event(error_json(error)) + DONE


class _Events:
    """What one HTTP request's sinks share. Owner: its EventStream. waiting: events that wait for the head of the response."""

    def __init__(self, connection: Connection, answer: AnswerFormat, slow_client_s: float) -> None:
        self.connection = connection
        self.waiting: list[bytes] = []
        self.moved = asyncio.Event()
        self._answer = answer
        self._slow_client_s = slow_client_s
        self._begun = False

    def begin(self) -> None:
        """The head has been written: the first events leave with it, all others as they come."""
        self._begun = True
        for data in self.waiting:
            self.connection.write_body(data)
        self.connection.flush()

    def put(self, prompt: int, chunk: Chunk) -> bool:
        data = self._answer.events(prompt, chunk)
        if self._begun:
            return self.connection.write_body(data)
        self.waiting.append(data)
        self.moved.set()
        return True

    async def room(self) -> None:
        try:
            async with asyncio.timeout(self._slow_client_s):
                await self.connection.room()
        except TimeoutError:
            raise unread(self._slow_client_s) from None


class _Part:
    """The sink of one prompt."""

    def __init__(self, events: _Events, prompt: int) -> None:
        self._events = events
        self._prompt = prompt

    def put(self, chunk: Chunk) -> bool:
        return self._events.put(self._prompt, chunk)

    async def room(self) -> None:
        await self._events.room()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it. Of earlier errors the first was told by whoever awaited it; a new one is a bug, so it is logged."""
    if task.done():
        if not task.cancelled():
            task.exception()  # counts as seen
        return
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is not None:
        log.error("a cancelled task failed", exc_info=task.exception())
