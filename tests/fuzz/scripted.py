"""A gRPC server that answers every method with bytes that a test chose: a peer that lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from baton.rpc import bind


class Liar(grpc.GenericRpcHandler):
    """Says `lines` on every call, whatever it hears, then waits until the peer leaves or (hangs_up) ends the call. Ended by `stop`."""

    def __init__(self) -> None:
        self.lines: Sequence[bytes] = ()
        self.hangs_up = False
        self.num_told = 0
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
        """Every method is one."""
        return grpc.stream_stream_rpc_method_handler(self._speak)

    async def _speak(self, requests: AsyncIterator[bytes], context: Any) -> None:
        hearing = asyncio.create_task(self._hear(requests))
        try:
            for line in self.lines:
                await context.write(line)
            self.num_told += 1
            if not self.hangs_up:
                await hearing
        finally:
            hearing.cancel()

    async def _hear(self, requests: AsyncIterator[bytes]) -> None:
        async for _ in requests:
            continue
