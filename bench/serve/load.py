"""Sending requests when their time has come, whether or not earlier ones have been answered. Knows the clock and backends.

An open loop: arrivals never wait for answers, unless a limit on concurrency holds them back; how late this process itself was in
sending what was due is written down with every answer (`sent_s` - `due_s`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from bench.serve.answers import Answer
from bench.serve.asks import Ask
from bench.serve.backend import Backend


class Load:
    """One run. Owner of its answers; ends when all have ended, or when `stop` is called.

    arrival_s: of each request, seconds after the start, ascending. tell: called with every answer that has ended.
    """

    def __init__(
        self,
        backend: Backend,
        asks: Sequence[Ask],
        arrival_s: Sequence[float],
        max_concurrency: int | None,
        tell: Callable[[Answer], None] = lambda answer: None,
        prefix: str = "bench-",
    ) -> None:
        assert len(asks) == len(arrival_s)
        self.answers: list[Answer] = []
        self.began_s = 0.0
        self.num_running = 0
        self._backend = backend
        self._prepared = [backend.prepare(ask, f"{prefix}{number}") for number, ask in enumerate(asks)]
        self._asks = asks
        self._arrival_s = arrival_s
        self._most = max_concurrency or len(asks)
        self._tell = tell
        self._held: deque[int] = deque()
        self._num_ended = 0
        self._over = asyncio.Event()

    async def run(self) -> list[Answer]:
        """Send everything; the answers, in the order of arrival. Every answer ends by its backend's deadline."""
        self.began_s = time.monotonic()
        self.answers = [Answer(ask, self.began_s + at_s) for ask, at_s in zip(self._asks, self._arrival_s, strict=True)]
        if not self._asks:
            return []
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(self._arrive())
            await self._over.wait()
            arriving.cancel()
        return self.answers

    def stop(self) -> None:
        """End the run; what has not ended stays unended."""
        self._over.set()

    async def _arrive(self) -> None:
        for number, answer in enumerate(self.answers):
            if (wait_s := answer.arrival_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            self._held.append(number)
            self._send_what_may_go()

    def _send_what_may_go(self, freed_s: float = 0.0) -> None:
        while self._held and self.num_running < self._most:
            number = self._held.popleft()
            answer = self.answers[number]
            answer.due_s = max(answer.arrival_s, freed_s)
            self.num_running += 1
            self._backend.send(self._prepared[number], answer, self._ended)

    def _ended(self, answer: Answer) -> None:
        self.num_running -= 1
        self._num_ended += 1
        self._tell(answer)
        if self._num_ended == len(self.answers):
            self._over.set()
        elif not self._over.is_set():
            self._send_what_may_go(answer.end_s)
