"""A source of blocks that says what a test tells it: the Transfer service over real gRPC, without leases and without blocks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from baton.rpc import bind, make_server
from baton.v1 import transfer_pb2, transfer_pb2_grpc

Reply = transfer_pb2.PullReply
QUEUED = Reply(queued=transfer_pb2.PullQueued())
RELEASED = Reply(released=transfer_pb2.Released())


def final(token_id: int = 42, output_index: int = 0, **more: object) -> transfer_pb2.FinalToken:
    """The token after a prompt."""
    return transfer_pb2.FinalToken(token_id=token_id, output_index=output_index, **more)


def announcement(first: int, count: int, **more: object) -> Reply:
    """Blocks first, first + 1, … of a prompt: source blocks 0, 1, …, of the generation of those that were never written."""
    sound = {"first_block": first, "block_ids": range(count), "generations": [0] * count}
    return Reply(announcement=transfer_pb2.Announcement(**sound | more))


class ScriptedSource(transfer_pb2_grpc.TransferServicer):
    """Answers every Pull with `script`, then, once a release was asked for, with `last`: a reply, the end of the stream, or silence."""

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.last: Reply | grpc.StatusCode | None = None
        self.asked: list[str] = []
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Serve; host:port."""
        self._server = make_server()
        transfer_pb2_grpc.add_TransferServicer_to_server(self, self._server)
        port = bind(self._server, "127.0.0.1", 0)
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """Break off everything."""
        assert self._server is not None
        await self._server.stop(None)

    async def Pulls(
        self,
        request_iterator: AsyncIterator[transfer_pb2.PullRequests],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        """See transfer.proto."""
        async for message in request_iterator:
            for request in message.requests:
                await self._hear(request, context)

    async def _hear(self, request: transfer_pb2.PullRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        what = str(request.WhichOneof("request"))
        if what != "leave":
            self.asked.append(what)
        if what == "open":
            for reply in self.script:
                await self._say(reply, request.pull, context)
        elif isinstance(self.last, Reply) and what == "release":
            await self._say(self.last, request.pull, context)
        elif self.last is not None and what == "release":
            await context.abort(self.last, "gone")

    async def _say(self, reply: Reply, pull: int, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        reply.pull = pull
        await context.write(transfer_pb2.PullReplies(replies=[reply]))
