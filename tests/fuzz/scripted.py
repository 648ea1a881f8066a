"""A gRPC server that answers every method with bytes that a test chose: a peer that lies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import grpc

from baton.rpc import bind

STREAMS = ("/Generate", "/Control", "/Pulls")


class Liar(grpc.GenericRpcHandler):
    """Says `lines` on every call, whatever it hears, then waits until the peer leaves or (hangs_up) ends the call. Ended by `stop`."""

    def __init__(self) -> None:
        self.lines: Sequence[bytes] = ()
        self.hangs_up = False
        self.num_told = 0
        self.num_calls = self.num_open = 0
        self.address = ""
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))

    async def start(self) -> str:
        """Listen; host:port."""
        self.address = f"127.0.0.1:{bind(self._server, '127.0.0.1', 0)}"
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        """End all calls."""
        await self._server.stop(None)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Every method is one. Where a stream is expected all lines are said, elsewhere the first one."""
        most = len(self.lines) if handler_call_details.method.endswith(STREAMS) else 1
        return grpc.stream_stream_rpc_method_handler(partial(self._speak, self.lines[:most]))

    async def _speak(self, lines: Sequence[bytes], requests: AsyncIterator[bytes], context: Any) -> None:
        hearing = asyncio.create_task(self._hear(requests))
        self.num_calls, self.num_open = self.num_calls + 1, self.num_open + 1
        try:
            with contextlib.suppress(grpc.aio.InternalError):  # the peer has heard enough
                for line in lines:
                    await context.write(line)
            self.num_told += 1
            if not self.hangs_up:
                await hearing
        finally:
            hearing.cancel()
            self.num_open -= 1

    async def _hear(self, requests: AsyncIterator[bytes]) -> None:
        async for _ in requests:
            continue
