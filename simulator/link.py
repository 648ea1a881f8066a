"""What lies between two simulated processes: delays and faults of each direction, drawn from the schedule's own chance.

Knows items and when they arrive; nothing of calls or messages. Time is the world's.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from simulator.loop import Process, VirtualLoop

SWAPPED_S = 0.02  # how much later an item comes that is overtaken


@dataclass(frozen=True, slots=True)
class Weather:
    """How a network behaves. Seconds; odds per item. window: unread items at which a writer has to wait.

    drop, double, swap: only for messages, and only where `Wire.lossy` is on: streams of real networks break instead.
    """

    least_s: float = 0.0002
    jitter_s: float = 0.002
    spike_odds: float = 0.0
    spike_s: float = 0.3
    window: int = 64
    drop: float = 0.0
    double: float = 0.0
    swap: float = 0.0


class Wire:
    """One direction of a link. silent: nothing arrives and nobody is told; what was sent comes, late, once it is not any more."""

    def __init__(self, loop: VirtualLoop, weather: Weather, chance: random.Random, counts: dict[str, int]) -> None:
        self.loop = loop
        self.weather = weather
        self.silent = False
        self.lossy = False
        self._chance = chance
        self._counts = counts
        self._kept: list[tuple[Lane, object]] = []

    def send(self, lane: Lane, item: object, *, message: bool = True) -> None:
        """Have an item arrive at the end of a lane, after those sent before it."""
        if self.silent:
            self._kept.append((lane, item))
        elif message and self.lossy:
            self._send_unsurely(lane, item)
        else:
            self._launch(lane, item)

    def speak(self) -> None:
        """The silence is over."""
        self.silent = False
        kept, self._kept = self._kept, []
        for lane, item in kept:
            self.send(lane, item)

    def _send_unsurely(self, lane: Lane, item: object) -> None:
        weather, luck = self.weather, self._chance.random()
        if luck < weather.drop:
            self._count("dropped")
            lane.took()  # it does not stay unread: nobody will read it
        elif luck < weather.drop + weather.swap:
            self._count("swapped")
            self.loop.later(self._delay_s() + SWAPPED_S, lane.arrive, item)
        else:
            self._launch(lane, item)
            if luck > 1 - weather.double:
                self._count("doubled")
                lane.num_unread += 1
                self._launch(lane, item)

    def _launch(self, lane: Lane, item: object) -> None:
        lane.last_s = max(lane.last_s, self.loop.now_s + self._delay_s())
        self.loop.later(lane.last_s - self.loop.now_s, lane.arrive, item)

    def _delay_s(self) -> float:
        weather = self.weather
        delay_s = weather.least_s + weather.jitter_s * self._chance.random()
        if weather.spike_odds and self._chance.random() < weather.spike_odds:
            delay_s += weather.spike_s * self._chance.random()
        return delay_s

    def _count(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1


class Lane:
    """One direction of one stream: what was sent and not read yet. Ended by `shut`; what still comes then is dropped.

    heard: called when an item arrives. written: whether somebody still says something, and may have to wait for room.
    """

    def __init__(self, wire: Wire, heard: Callable[[object], None]) -> None:
        self.last_s = 0.0
        self.num_unread = 0
        self.open = True
        self.written = True
        self._wire = wire
        self._heard = heard
        self._items: deque[object] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()

    def send(self, item: object, *, message: bool = True) -> None:
        """Say something."""
        self.num_unread += 1
        self._wire.send(self, item, message=message)

    def arrive(self, item: object) -> None:
        """The item is there."""
        if self.open:
            self._heard(item)
            self._items.append(item)
            self._wake()

    @property
    def full(self) -> bool:
        """Whether a writer has to wait."""
        return self.num_unread >= self._wire.weather.window and self.open and self.written

    async def room(self) -> None:
        """Wait until there is room, or nobody to write to."""
        while self.full:
            writer: asyncio.Future[None] = self._wire.loop.create_future()
            self._writers.append(writer)
            await writer

    async def take(self) -> object | None:
        """The next item; None once the lane is shut and empty."""
        while not self._items:
            if not self.open:
                return None
            self._reader = self._wire.loop.create_future()
            await self._reader
        self.took()
        return self._items.popleft()

    def took(self) -> None:
        """One item less to be read."""
        self.num_unread -= 1
        self._release()

    def end_writing(self) -> None:
        """Nobody says anything more, what was said arrives."""
        self.written = False
        self._release()

    def shut(self, *, forget: bool = False) -> None:
        """Nothing arrives any more. forget: nor is read what has arrived."""
        self.open = False
        if forget:
            self._items.clear()
        self._wake()
        self._release()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _release(self) -> None:
        while self._writers and not self.full:
            writer = self._writers.popleft()
            if not writer.done():
                writer.set_result(None)


class Link:
    """Both directions between two processes. there: from `near` to `far`. deaf_since_s: when it last became so."""

    def __init__(self, near: Process, far: Process, there: Wire, back: Wire) -> None:
        self.near, self.far = near, far
        self.there, self.back = there, back
        self.deaf_since_s = 0.0

    @property
    def silent(self) -> bool:
        """Whether what is said does not get an answer."""
        return self.there.silent or self.back.silent

    @property
    def deaf(self) -> bool:
        """Whether nobody answers keepalives: silence, or a process at either end that is stopped or dead."""
        return self.silent or self.near.halted or self.far.halted
