"""Calls over simulated links, as grpc.aio shows them to a client. Knows no services; the server's side is in serving.py.

A gRPC door. What grpc.aio does when a call is cancelled, broken or over is repeated here as it was read in its source: a read or write
that is cancelled cancels its call; a status comes after the messages before it, a break does not wait for them. Messages are
copied when they are sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from simulator.link import Lane, Link
from simulator.loop import VirtualLoop

EOF: object = grpc.aio.EOF  # type: ignore[attr-defined]  # what is read where a call has ended well
Message = Any  # a protobuf message
Trailer = tuple[tuple[str, bytes], ...]
Note = Callable[["Stream", str, object], None]


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended, as the client is told."""

    code: grpc.StatusCode
    details: str = ""
    trailer: Trailer = ()


@dataclass(frozen=True, slots=True)
class Opening:
    """The first thing a client sends. timeout_s: what it says of its patience."""

    timeout_s: float | None = None


class HalfClose:
    """The client has no more to say."""


class Reset:
    """The client has no use for the call any more."""


def copied(message: Message) -> Message:
    """What the other side gets."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


class Stream:
    """One call on its way between two processes. State owner: the network that carries it, which is told by `ended`.

    status: how it ended, once the client knows. client_gone: whether the server knows that nobody listens. served: whether it has ended
    the call. accept: called in the world when the opening has arrived. note: told of everything that arrives, for traces.
    """

    def __init__(
        self, loop: VirtualLoop, link: Link, number: int, method: str, accept: Callable[[Stream, Opening], None], note: Note | None
    ) -> None:
        self.loop = loop
        self.link = link
        self.number = number
        self.method = method
        self.up = Lane(link.there, self._heard)
        self.down = Lane(link.back, self._noted)
        self.status: Status | None = None
        self.client_gone = False
        self.served = False
        self.handler: asyncio.Task[None] | None = None
        self._accept = accept
        self._note = note

    @property
    def over(self) -> bool:
        """Whether both sides have done with it."""
        return self.status is not None and (self.served or self.client_gone)

    def _heard(self, item: object) -> None:
        self._noted(item, "→")
        if isinstance(item, Opening):
            self._accept(self, item)
        elif isinstance(item, Reset):
            self.lose_client()

    def _noted(self, item: object, arrow: str = "←") -> None:
        self.loop.mark(self.number)
        if self._note is not None:
            self._note(self, arrow, item)

    def finish(self, status: Status) -> None:
        """The server has ended the call: the client hears of it after all that was said before."""
        if not self.served:
            self.served = True
            self.up.shut()
            self.down.send(status, message=False)

    def lose_client(self) -> None:
        """The server learns that nobody listens any more: the task that serves the call is cancelled, its requests have ended."""
        self.client_gone = True
        self.up.shut(forget=True)
        self.down.shut()
        if self.handler is not None and not self.handler.done():
            self.handler.cancel()

    def lose_server(self, status: Status, *, forget: bool) -> None:
        """The client learns that the call is over. forget: without what it has not read yet."""
        if self.status is None:
            self.status = status
            self.down.shut(forget=forget)
            self.up.end_writing()

    def break_up(self, why: str, *, forget: bool) -> None:
        """The connection is broken, and both ends know."""
        self.lose_server(Status(grpc.StatusCode.UNAVAILABLE, why), forget=forget)
        self.lose_client()


class SimCall:
    """A call as its client sees it: grpc.aio's StreamStreamCall, UnaryStreamCall and UnaryUnaryCall in one.

    timeout_s: what the server is told; patience_s: when this side gives up (None: never). gave_up: whether it did.
    """

    def __init__(self, stream: Stream, timeout_s: float | None, patience_s: float | None) -> None:
        self.gave_up = False
        self._stream = stream
        self._half_closed = False
        self._cancelled = False
        self._timer = None if patience_s is None else stream.loop.call_later(patience_s, self._too_late)
        stream.up.send(Opening(timeout_s), message=False)

    def done(self) -> bool:
        """Whether the call is over."""
        return self._stream.status is not None

    def cancelled(self) -> bool:
        """Whether this side cancelled it."""
        return self._cancelled

    def cancel(self) -> bool:
        """End the call; False if it is over."""
        if self.done():
            return False
        self._cancelled = True
        self._leave(Status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))
        return True

    async def write(self, request: Message) -> None:
        """Say something; waits while too much is unread."""
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        if self._half_closed:
            raise asyncio.InvalidStateError('RPC is half closed after calling "done_writing".')
        try:
            await self._stream.up.room()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.done():
            self._raise_for_status()
        self._stream.up.send(copied(request))

    def say(self, item: object) -> None:
        """Say something for which there certainly is room."""
        self._stream.up.send(item, message=False)

    async def done_writing(self) -> None:
        """Say that nothing more will be said."""
        if not self.done() and not self._half_closed:
            self._half_closed = True
            self._stream.up.send(HalfClose(), message=False)

    async def read(self) -> Message:
        """The next message, or grpc.aio.EOF."""
        try:
            item = await self._stream.down.take()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if item is not None and not isinstance(item, Status):
            return item
        if item is not None:
            self._over(item)
        self._raise_for_status()
        return EOF

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        message = await self.read()
        if message is EOF:
            raise StopAsyncIteration
        return message

    async def code(self) -> grpc.StatusCode:
        """How it ended, once it has; what was not read before is lost."""
        return (await self._ended()).code

    async def details(self) -> str:
        """Why it ended, once it has; what was not read before is lost."""
        return (await self._ended()).details

    async def _ended(self) -> Status:
        while self._stream.status is None:
            item = await self._stream.down.take()
            if isinstance(item, Status):
                self._over(item)
        return self._stream.status

    def _over(self, status: Status) -> None:
        self._stream.lose_server(status, forget=True)
        if self._timer is not None:
            self._timer.cancel()

    def _leave(self, status: Status) -> None:
        self._over(status)
        self._stream.up.send(Reset(), message=False)

    def _too_late(self) -> None:
        if not self.done():
            self.gave_up = True
            self._leave(Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _raise_for_status(self) -> None:
        status = self._stream.status
        assert status is not None, "a lane is shut with a status"
        if self._cancelled:
            raise asyncio.CancelledError
        if status.code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailer), status.details, None)
