"""A server's door over real gRPC: bytes that are no message, errors of methods, too many calls or connections; each refused and counted."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton import rpc
from baton.errors import BatonError, InvalidRequest, NodeLost, NotFound, ResourceExhausted
from baton.rpc import ERROR_TRAILER, Door, bind, make_server, open_channel, to_error
from baton.telemetry import Refusals
from baton.v1 import node_pb2, node_pb2_grpc, rank_pb2, rank_pb2_grpc

NOISE = b"\xff\xff\xff"
WAKE, READ = "/baton.v1.RankControl/Wake", "/baton.v1.RankControl/Read"
CONTROL = "/baton.v1.PrefillNode/Control"


class Side(rank_pb2_grpc.RankControlServicer, node_pb2_grpc.PrefillNodeServicer):
    """Wake raises what the test wants, Read waits until it may end, Control echoes beats."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.may_end = asyncio.Event()
        self.num_reading = 0

    async def Wake(self, request: rank_pb2.WakeRequest, context: Any) -> rank_pb2.WakeReply:
        """See proto."""
        if self.error is not None:
            raise self.error
        return rank_pb2.WakeReply()

    async def Read(self, request: rank_pb2.ReadRequest, context: Any) -> rank_pb2.ReadReply:
        """See proto."""
        self.num_reading += 1
        await self.may_end.wait()
        return rank_pb2.ReadReply()

    async def Ping(self, request: rank_pb2.PingRequest, context: Any) -> rank_pb2.PingReply:
        """See proto."""
        await rpc.abort(context, NotFound("nobody", cause="nobody_here"))

    async def Control(self, requests: AsyncIterator[node_pb2.PrefillCommand], context: Any) -> None:
        """See proto."""
        async for command in requests:
            await context.write(node_pb2.NodeEvent(flushed=[node_pb2.CacheFlushed(number=command.beat.number)]))


@asynccontextmanager
async def serving(side: Side, **settings: Any) -> AsyncIterator[tuple[grpc.aio.Channel, Door, str]]:
    door = Door(Refusals("test", logging.getLogger("test")), **settings.pop("door", {}))
    server = make_server(2**20, door, **settings)
    rank_pb2_grpc.add_RankControlServicer_to_server(side, server)
    node_pb2_grpc.add_PrefillNodeServicer_to_server(side, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(20):
            yield channel, door, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def refusal(call: Any) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return to_error(caught.value)


async def test_noise_is_a_bad_request_and_counted(caplog):
    async with serving(Side()) as (channel, door, _):
        error = await refusal(channel.unary_unary(WAKE)(NOISE))
        assert isinstance(error, InvalidRequest) and error.cause == "malformed" and "3 bytes" in error.message
        call = channel.stream_stream(CONTROL)()
        await call.write(node_pb2.PrefillCommand(beat=node_pb2.Beat(number=4)).SerializeToString())
        assert node_pb2.NodeEvent.FromString(await call.read()).flushed[0].number == 4
        await call.write(NOISE)
        assert (await refusal(call.read())).cause == "malformed"
        assert await channel.unary_unary(WAKE)(b"") == b"" and door._refusals.counts == {"malformed": 2} and door.num_calls == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_errors_of_methods_are_told_and_refusals_counted():
    side = Side()
    async with serving(side) as (channel, door, _):
        for side.error in (InvalidRequest("no", cause="bad"), NodeLost("gone"), ResourceExhausted("full", retry_after_s=2.0)):
            told = await refusal(channel.unary_unary(WAKE)(b""))
            assert isinstance(told, (InvalidRequest, ResourceExhausted)) or told.cause == "node_lost"
            assert (told.message, told.retry_after_s) == (side.error.message, side.error.retry_after_s)
        assert isinstance(await refusal(channel.unary_unary("/baton.v1.RankControl/Ping")(b"")), NotFound)
        assert door._refusals.counts == {"bad": 1, "resource_exhausted": 1, "nobody_here": 1}
        assert (await refusal(channel.unary_unary("/baton.v1.RankControl/Nothing")(b""))).cause == "incompatible"


async def test_too_many_calls_are_refused_with_the_number_and_some_services_stay_open():
    side = Side()
    async with serving(side, door={"max_calls": 2, "always": ("baton.v1.PrefillNode",)}) as (channel, door, _):
        reading = [asyncio.ensure_future(channel.unary_unary(READ)(b"")) for _ in range(2)]
        while side.num_reading < 2:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)
        error = await refusal(channel.unary_unary(WAKE)(b""))
        assert isinstance(error, ResourceExhausted) and "2 calls" in error.message and error.retry_after_s == 1.0
        call = channel.stream_stream(CONTROL)()
        await call.write(b"")
        await call.read()
        call.cancel()
        reading[0].cancel()
        while door.num_calls > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await channel.unary_unary(WAKE)(b"") == b""
        side.may_end.set()
        assert await reading[1] == b""
    assert door.num_calls == 0


async def test_connections_are_few_enough_and_those_that_say_nothing_end():
    async with serving(Side(), max_connections=2) as (channel, _, address):
        assert await channel.unary_unary(WAKE)(b"") == b""
        host, port = address.split(":")
        socks = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2)]
        data = [await asyncio.to_thread(sock.recv, 100) for sock in socks]
        assert sorted(map(bool, data)) == [False, True], "the one beyond the limit is closed at once, the other gets HTTP/2 settings"
        assert await channel.unary_unary(WAKE)(b"") == b""
        for sock in socks:
            sock.close()


async def test_a_trailer_that_cannot_be_read_leaves_the_status():
    class Liar(rank_pb2_grpc.RankControlServicer):
        async def Wake(self, request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no", ((ERROR_TRAILER, NOISE),))

    server = grpc.aio.server()
    rank_pb2_grpc.add_RankControlServicer_to_server(Liar(), server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        error = await refusal(channel.unary_unary(WAKE)(b""))
    await server.stop(None)
    assert isinstance(error, InvalidRequest) and error.message == "no"
