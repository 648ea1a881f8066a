"""Calls over simulated links, as grpc.aio shows them to a server: what generated code registers, contexts, requests.

A gRPC door. As in grpc.aio, a call that breaks or is cancelled has its requests end and the task that serves it cancelled, and
nothing else: tasks which that one has made are its own affair.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc

from baton.rpc import Door
from baton.telemetry import Refusals
from simulator.link import Lane
from simulator.loop import Process, VirtualLoop
from simulator.stream import HalfClose, Message, Opening, Reset, Status, Stream, Trailer, copied

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Method:
    """What a handler is asked for."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class SimServer:
    """What one process serves at one address: grpc.aio.Server as generated `add_…_to_server` functions see it."""

    def __init__(self, loop: VirtualLoop, process: Process) -> None:
        self.process = process
        self._loop = loop
        self._door = Door(Refusals("grpc", log))
        self._handlers: list[grpc.GenericRpcHandler[Any, Any]] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """See grpc."""
        self._handlers += handlers

    def accept(self, stream: Stream, opening: Opening) -> None:
        """A call has come: in its turn, the process serves it."""
        self.process.do(self._begin, stream, opening)

    def _begin(self, stream: Stream, opening: Opening) -> None:
        if not stream.client_gone:
            stream.handler = self._loop.create_task(self._serve(stream, opening), name=stream.method)

    async def _serve(self, stream: Stream, opening: Opening) -> None:
        context = SimContext(self._loop, stream, opening.timeout_s)
        try:
            await self._handle(stream, context)
        except grpc.aio.AbortError:
            return
        except asyncio.CancelledError:
            stream.finish(Status(grpc.StatusCode.CANCELLED, "the server's task was cancelled"))
            raise
        except Exception as error:  # as grpc.aio does; and here no such error goes unseen
            self._loop.failures.append(error)
            stream.finish(Status(grpc.StatusCode.UNKNOWN, repr(error)))
        else:
            stream.finish(Status(grpc.StatusCode.OK))

    async def _handle(self, stream: Stream, context: SimContext) -> None:
        found = await self._door.intercept_service(self._find, cast("grpc.HandlerCallDetails", Method(stream.method)))
        if found is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{stream.method} is not served here")
        requests = Requests(stream.up)
        if found.stream_stream is not None:
            await found.stream_stream(requests, context)
        elif found.unary_stream is not None:
            await found.unary_stream(await anext(requests), context)
        else:
            await context.write(await found.unary_unary(await anext(requests), context))

    async def _find(self, method: grpc.HandlerCallDetails) -> Any:
        return next((handler for own in self._handlers if (handler := own.service(method))), None)


class Requests:
    """What a client says, until it half-closes or is gone."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        while isinstance(item := await self._lane.take(), Opening):
            pass
        if item is None or isinstance(item, HalfClose | Reset):
            raise StopAsyncIteration
        return item


class SimContext:
    """A call as the code that serves it sees it: grpc.aio.ServicerContext."""

    def __init__(self, loop: VirtualLoop, stream: Stream, timeout_s: float | None) -> None:
        self._loop = loop
        self._stream = stream
        self._until_s = None if timeout_s is None else loop.now_s + timeout_s
        self._aborted = Status(grpc.StatusCode.OK)

    async def write(self, message: Message) -> None:
        """Say something; waits while too much is unread."""
        self._check()
        await self._stream.down.room()
        self._check()
        self._stream.down.send(copied(message))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailer = ()) -> NoReturn:
        """End the call with an error."""
        self._aborted = Status(code, details, trailing_metadata)
        self._stream.finish(self._aborted)
        raise grpc.aio.AbortError("Locally aborted.")

    def cancelled(self) -> bool:
        """Whether the client is known to be gone."""
        return self._stream.client_gone

    def done(self) -> bool:
        """Whether the call is over."""
        return self._stream.client_gone or self._stream.served

    def time_remaining(self) -> float | None:
        """Seconds that the client said it would wait, and has not waited yet."""
        return None if self._until_s is None else max(0.0, self._until_s - self._loop.now_s)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """No simulated client sends any."""
        return ()

    def code(self) -> grpc.StatusCode:
        """What it was aborted with."""
        return self._aborted.code

    def details(self) -> str:
        """Why it was aborted."""
        return self._aborted.details

    def trailing_metadata(self) -> Trailer:
        """What was said with it."""
        return self._aborted.trailer

    def _check(self) -> None:
        if self._stream.served:
            raise grpc.aio.UsageError("RPC already finished.")
        if self._stream.client_gone:
            raise asyncio.CancelledError
