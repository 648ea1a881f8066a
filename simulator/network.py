"""The simulated network: which process listens where, what may be said between whom, and what goes wrong with it.

A gRPC door: gives processes channels that the production code takes for grpc.aio's. Faults are ordered from outside, by the two
processes they lie between; chance only decides about delays and single messages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import grpc

from simulator.link import Link, Weather, Wire
from simulator.loop import Process, VirtualLoop
from simulator.serving import SimServer
from simulator.stream import HalfClose, Message, Note, Opening, SimCall, Status, Stream, copied

KEEPALIVE_S = 15.0  # silence after which a connection counts as broken (see baton.rpc)
LENIENCE_S = 2.0  # how much longer than it says a client waits: whoever serves it should have answered by then
_MOST_STREAMS = 256  # looked at before those that are over are forgotten


class Network:
    """All links of one world. State owner: the world. counts: single messages that were dropped, doubled or swapped."""

    def __init__(self, loop: VirtualLoop, weather: Weather, chance: random.Random) -> None:
        self.loop = loop
        self.weather = weather
        self.counts: dict[str, int] = {}
        self.num_streams = 0
        self.note: Note | None = None
        self.calm: dict[Process, Weather] = {}  # around these client processes it is as told here
        self._chance = chance
        self._servers: dict[str, SimServer] = {}
        self._links: dict[tuple[Process, Process], Link] = {}
        self._streams: dict[int, Stream] = {}
        self._nobody = loop.process("nobody")
        self._nobody.kill()

    # What processes do.

    def listen(self, process: Process, address: str) -> SimServer:
        """Have a process serve an address, in the place of who did before."""
        server = self._servers[address] = SimServer(self.loop, process)
        return server

    def opener(self, process: Process) -> Callable[[str], grpc.aio.Channel]:
        """What opens channels in a process (see baton.rpc.open_channel)."""
        return lambda address: cast("grpc.aio.Channel", SimChannel(self, process, address))

    def open(self, process: Process, address: str, method: str) -> Stream:
        """A new stream from a process to an address, whoever listens there."""
        server = self._servers.get(address)
        link = self.link(process, server.process if server is not None else self._nobody)
        accept = self._refuse if server is None or server.process.dead else server.accept
        self.num_streams += 1
        stream = self._streams[self.num_streams] = Stream(self.loop, link, self.num_streams, method, accept, self.note)
        if link.deaf:
            self._watch(link)  # as long as it lasts, no call outlives the next look
        if len(self._streams) > _MOST_STREAMS:
            self._streams = {number: known for number, known in self._streams.items() if not known.over}
        return stream

    def _refuse(self, stream: Stream, opening: Opening) -> None:
        stream.finish(Status(grpc.StatusCode.UNAVAILABLE, "connection refused"))

    # What goes wrong.

    def link(self, near: Process, far: Process) -> Link:
        """What lies between a client process and a server process."""
        known = self._links.get((near, far))
        if known is None:
            weather = self.calm.get(near, self.weather)
            there, back = (Wire(self.loop, weather, self._chance, self.counts) for _ in range(2))
            known = self._links[near, far] = Link(near, far, there, back)
        return known

    def all_links(self) -> tuple[Link, ...]:
        """Of all pairs of processes that ever spoke, or were to."""
        return tuple(self._links.values())

    def links(self, process: Process) -> Iterator[Link]:
        """All links of a process."""
        return (link for link in self._links.values() if process in (link.near, link.far))

    def cut(self, link: Link) -> None:
        """The connection breaks, and both sides hear of it."""
        self._break(link, "connection reset")

    def silence(self, link: Link, *, there: bool = True, back: bool = True) -> None:
        """Nothing arrives any more in one direction or both, and nobody is told before keepalives fail."""
        self._begin_deafness(link)
        link.there.silent |= there
        link.back.silent |= back

    def heal(self, link: Link) -> None:
        """What is sent arrives again, and so does what was on its way."""
        for wire in (link.there, link.back):
            if wire.silent:
                wire.speak()

    def lose_some(self, link: Link, lossy: bool) -> None:
        """From now on single messages get lost, doubled and swapped, or no more."""
        link.there.lossy = link.back.lossy = lossy

    def kill(self, process: Process) -> None:
        """SIGKILL. Its peers hear of it unless their link is silent."""
        process.kill()
        for link in self.links(process):
            if not link.silent:
                self._break(link, "socket closed")

    def stop(self, process: Process) -> None:
        """SIGSTOP. Its peers hear nothing, not even that."""
        for link in self.links(process):
            self._begin_deafness(link)
        process.stop()

    def _begin_deafness(self, link: Link) -> None:
        if not link.deaf:
            link.deaf_since_s = self.loop.now_s
        self._watch(link)

    def _watch(self, link: Link) -> None:
        self.loop.later(KEEPALIVE_S, self._keepalive, link)

    def _keepalive(self, link: Link) -> None:
        if link.deaf and self.loop.now_s - link.deaf_since_s >= KEEPALIVE_S:
            for stream in self._on(link):
                stream.break_up("keepalive watchdog timeout", forget=True)

    def _break(self, link: Link, why: str) -> None:
        for stream in self._on(link):
            delay_s, forget = self.weather.jitter_s * self._chance.random(), self._chance.random() < 0.5
            self.loop.later(self.weather.least_s + delay_s, lambda stream=stream, forget=forget: stream.break_up(why, forget=forget))

    def _on(self, link: Link) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.link is link and not stream.over]


class SimChannel:
    """grpc.aio.Channel from a process to an address, as far as stubs use it."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self._network = network
        self._process = process
        self._address = address
        self._calls: list[SimCall] = []

    def stream_stream(self, method: str, **_: object) -> Callable[..., SimCall]:
        """See grpc."""
        return lambda **settings: self._call(method, **settings)

    def unary_stream(self, method: str, **_: object) -> Callable[..., SimCall]:
        """See grpc."""
        return lambda request, **settings: self._ask(method, request, **settings)

    def unary_unary(self, method: str, **_: object) -> Callable[..., SimReply]:
        """See grpc."""
        return lambda request, **settings: SimReply(self._ask(method, request, **settings))

    async def close(self, grace: float | None = None) -> None:
        """End all calls."""
        calls, self._calls = self._calls, []
        for call in calls:
            call.cancel()

    def _call(self, method: str, timeout: float | None = None, **_: object) -> SimCall:
        stream = self._network.open(self._process, self._address, method)
        call = SimCall(stream, timeout, None if timeout is None else timeout + LENIENCE_S)
        self._calls = [*(known for known in self._calls if not known.done()), call]
        return call

    def _ask(self, method: str, request: Message, **settings: Any) -> SimCall:
        call = self._call(method, **settings)
        call.say(copied(request))
        call.say(HalfClose())
        return call


class SimReply:
    """A call with one answer: grpc.aio.UnaryUnaryCall."""

    def __init__(self, call: SimCall) -> None:
        self._call = call

    def cancel(self) -> bool:
        """End the call; False if it is over."""
        return self._call.cancel()

    def __await__(self) -> Generator[Any, None, Message]:
        return self._answer().__await__()

    async def _answer(self) -> Message:
        return await self._call.read()
