"""Links do to calls what their faults say, and nothing else: messages stay in order, breaks are heard, silence is not."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest

from baton.v1 import node_pb2, node_pb2_grpc
from simulator.link import Link, Weather
from simulator.loop import Process, VirtualLoop
from simulator.network import KEEPALIVE_S, Network

ADDRESS = "far:1"


@dataclass
class World:
    loop: VirtualLoop
    network: Network
    near: Process
    far: Process
    heard: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    @property
    def link(self) -> Link:
        return self.network.link(self.near, self.far)

    def run(self, scenario):
        async def work():
            return await self.near.spawn(scenario(self, node_pb2_grpc.PrefillNodeStub(self.network.opener(self.near)(ADDRESS)).Control()))

        return self.loop.run(work())


class Listener(node_pb2_grpc.PrefillNodeServicer):
    """Writes down what it hears and answers every command."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def Control(self, request_iterator, context):
        try:
            async for request in request_iterator:
                self.world.heard.append(request.beat.number)
                await context.write(node_pb2.NodeEvent(load=node_pb2.Load(beat=request.beat.number)))
            self.world.ends.append("half-closed")
        except asyncio.CancelledError:
            self.world.ends.append("cancelled")
            raise


@pytest.fixture
def weather() -> Weather:
    return Weather()


@pytest.fixture
def world(weather: Weather) -> Iterator[World]:
    loop = VirtualLoop()
    world = World(loop, Network(loop, weather, random.Random(7)), loop.process("near", 3), loop.process("far", 5))
    node_pb2_grpc.add_PrefillNodeServicer_to_server(Listener(world), world.network.listen(world.far, ADDRESS))
    yield world
    loop.close()
    assert not loop.failures


def said(number):
    return node_pb2.PrefillCommand(beat=node_pb2.Beat(number=number))


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            await call.read()
    return caught.value.code()


@pytest.mark.parametrize("weather", [Weather(jitter_s=0.5, spike_odds=0.3, window=1000)])
def test_messages_stay_in_order_whatever_the_jitter(world):
    async def scenario(world, call):
        for number in range(200):
            await call.write(said(number))
        return [(await call.read()).load.beat for _ in range(200)]

    assert world.run(scenario) == list(range(200)) == world.heard


def test_a_message_is_a_copy(world):
    async def scenario(world, call):
        message = said(1)
        await call.write(message)
        message.beat.number = 99
        await call.read()

    world.run(scenario)
    assert world.heard == [1]


def test_a_cut_is_heard_at_both_ends(world):
    async def scenario(world, call):
        await call.write(said(1))
        await call.read()
        world.network.cut(world.link)
        code = await code_of(call)
        await asyncio.sleep(1)
        return code

    assert world.run(scenario) is grpc.StatusCode.UNAVAILABLE
    assert world.ends == ["cancelled"]


@pytest.mark.parametrize(("there", "back"), [(True, True), (True, False), (False, True)])
def test_silence_delays_and_loses_nothing_if_it_ends_in_time(world, there, back):
    async def scenario(world, call):
        world.network.silence(world.link, there=there, back=back)
        await call.write(said(1))
        await asyncio.sleep(KEEPALIVE_S - 1)
        before = list(world.heard)
        world.network.heal(world.link)
        return before, (await call.read()).load.beat

    assert world.run(scenario) == ([] if there else [1], 1)


def test_silence_breaks_what_is_open_when_keepalives_fail(world):
    async def scenario(world, call):
        await call.write(said(1))
        await call.read()
        world.network.silence(world.link)
        began_s = world.loop.now_s
        return await code_of(call), world.loop.now_s - began_s

    code, seconds = world.run(scenario)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert seconds == pytest.approx(KEEPALIVE_S, abs=0.01)


def test_a_killed_server_is_heard_and_a_new_call_is_refused(world):
    async def scenario(world, call):
        await call.write(said(1))
        await call.read()
        world.network.kill(world.far)
        first = await code_of(call)
        return first, await code_of(node_pb2_grpc.PrefillNodeStub(world.network.opener(world.near)(ADDRESS)).Control())

    assert world.run(scenario) == (grpc.StatusCode.UNAVAILABLE,) * 2
    assert world.ends == []


def test_a_stopped_server_says_nothing_and_goes_on(world):
    async def scenario(world, call):
        await call.write(said(1))
        await call.read()
        world.network.stop(world.far)
        await call.write(said(2))
        await asyncio.sleep(5)
        before = list(world.heard)
        world.far.resume()
        return before, (await call.read()).load.beat

    assert world.run(scenario) == ([1], 2)


@pytest.mark.parametrize("weather", [Weather(drop=0.1, double=0.1, swap=0.1, window=1000)])
def test_single_messages_are_lost_doubled_and_swapped_only_on_a_lossy_link(world):
    async def scenario(world, call):
        for number in range(100):
            await call.write(said(number))
        await asyncio.sleep(1)
        before = list(world.heard)
        world.network.lose_some(world.link, True)
        for number in range(100, 400):
            await call.write(said(number))
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        return before

    assert world.run(scenario) == list(range(100))
    lossy = [number for number in world.heard if number >= 100]
    counts = world.network.counts
    assert 300 > len(set(lossy)) > 230, "some were dropped"
    assert len(lossy) > len(set(lossy)), "some came twice"
    assert lossy != sorted(lossy), "some were overtaken"
    assert min(counts[what] for what in ("dropped", "doubled", "swapped")) > 0


@pytest.mark.parametrize("weather", [Weather(window=4)])
def test_a_writer_waits_for_a_reader(world):
    async def scenario(world, call):
        world.network.stop(world.far)
        written = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                while True:
                    await call.write(said(written))
                    written += 1
        return written, call.cancelled()

    assert world.run(scenario) == (3, True)  # the opening is unread, too
