"""Simulated calls behave as grpc.aio's do: every scenario here runs over both, and comes to the same."""

import asyncio
import contextlib
import random
import socket

import grpc
import pytest

from baton.rpc import bind, make_server, open_channel
from baton.v1 import node_pb2, node_pb2_grpc, rank_pb2, rank_pb2_grpc
from simulator.link import Weather
from simulator.loop import VirtualLoop
from simulator.network import Network

Beat = node_pb2.Beat


def said(number):
    return node_pb2.PrefillCommand(beat=Beat(number=number))


class Node(node_pb2_grpc.PrefillNodeServicer, rank_pb2_grpc.RankControlServicer):
    """Serves a Control call as the scenario says, and writes down what it sees."""

    def __init__(self, serve):
        self.serve = serve
        self.seen = []

    async def Control(self, request_iterator, context):
        try:
            await self.serve(self, request_iterator, context)
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise

    async def Ping(self, request, context):
        return rank_pb2.PingReply(steps=7)

    async def Wake(self, request, context):
        await context.abort(grpc.StatusCode.NOT_FOUND, "nobody sleeps")


async def echo(node, requests, context):
    async for request in requests:
        await context.write(node_pb2.NodeEvent(load=node_pb2.Load(beat=request.beat.number)))


async def refuse(node, requests, context):
    await anext(requests)
    await context.write(node_pb2.NodeEvent(load=node_pb2.Load(beat=1)))
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no", (("why-bin", b"\x01\x02"),))


async def say_two_and_end(node, requests, context):
    for beat in (1, 2):
        await context.write(node_pb2.NodeEvent(load=node_pb2.Load(beat=beat)))


async def listen_aside(node, requests, context):
    """Reads in a task of its own, which nobody cancels when the call is."""

    async def read():
        async for request in requests:
            node.seen.append(request.beat.number)
        node.seen.append("end")

    node.reading = asyncio.create_task(read())
    await context.write(node_pb2.NodeEvent())
    await asyncio.sleep(10)


async def hang(node, requests, context):
    await asyncio.sleep(10)


async def an_echo_until_half_closed(channel, node):
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    answers = []
    for number in (1, 2):
        await call.write(said(number))
        answers.append((await call.read()).load.beat)
    await call.done_writing()
    return answers, await call.read() is grpc.aio.EOF, await call.code(), call.done()


async def a_refusal_comes_after_what_was_said(channel, node):
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    await call.write(said(1))
    beats = []
    try:
        async for event in call:
            beats.append(event.load.beat)
    except grpc.aio.AioRpcError as error:
        return beats, error.code(), error.details(), dict(error.trailing_metadata()), call.cancelled()


async def the_end_of_the_server(channel, node):
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    return [event.load.beat async for event in call], await call.code()


async def a_read_that_is_cancelled_cancels_its_call(channel, node):
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    await call.write(said(1))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await call.read()
    await asyncio.sleep(0.3)
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(said(2))
    return call.done(), call.cancelled(), await call.code(), node.seen


async def a_cancel_ends_requests_and_handler(channel, node):
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    await call.write(said(1))
    await call.write(said(2))
    await call.read()
    await asyncio.sleep(0.2)
    call.cancel()
    await asyncio.sleep(0.3)
    return sorted(map(str, node.seen)), node.reading.done()


async def a_deadline_of_the_client(channel, node):
    try:
        await rank_pb2_grpc.RankControlStub(channel).Wake(rank_pb2.WakeRequest(), timeout=5)
    except grpc.aio.AioRpcError as error:
        refused = error.code(), error.details()
    reply = await rank_pb2_grpc.RankControlStub(channel).Ping(rank_pb2.PingRequest(), timeout=5)
    return refused, reply.steps


async def nobody_listens(channel, node):
    call = node_pb2_grpc.PrefillNodeStub(channel).Control()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(said(1))
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return error.code()


SCENARIOS = [
    (an_echo_until_half_closed, echo),
    (a_refusal_comes_after_what_was_said, refuse),
    (the_end_of_the_server, say_two_and_end),
    (a_read_that_is_cancelled_cancels_its_call, hang),
    (a_cancel_ends_requests_and_handler, listen_aside),
    (a_deadline_of_the_client, echo),
    (nobody_listens, None),
]


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


async def really(scenario, serve):
    node, server = Node(serve), make_server()
    node_pb2_grpc.add_PrefillNodeServicer_to_server(node, server)
    rank_pb2_grpc.add_RankControlServicer_to_server(node, server)
    port = bind(server, "127.0.0.1", 0) if serve is not None else closed_port()
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")
    try:
        return await scenario(channel, node)
    finally:
        await channel.close()
        await server.stop(None)


def virtually(scenario, serve):
    loop = VirtualLoop()
    network = Network(loop, Weather(), random.Random(1))
    near, far, node = loop.process("near", 50), loop.process("far", 7), Node(serve)
    if serve is not None:
        server = network.listen(far, "far:1")
        node_pb2_grpc.add_PrefillNodeServicer_to_server(node, server)
        rank_pb2_grpc.add_RankControlServicer_to_server(node, server)

    async def work():
        return await near.spawn(scenario(network.opener(near)("far:1"), node))

    try:
        return loop.run(work())
    finally:
        loop.close()
        assert not loop.failures


@pytest.mark.parametrize(("scenario", "serve"), SCENARIOS, ids=lambda value: value.__name__ if value else "")
async def test_a_simulated_call_is_like_a_real_one(scenario, serve):
    # In a thread of its own, since two loops cannot run in one.
    simulated = await asyncio.to_thread(virtually, scenario, serve)
    assert simulated == await really(scenario, serve)
