"""The clients: so many at a time, each with the next request, as far as the run allows. Knows doors and the clock; no faults.

A client sends a request again where it was refused for want of room, and where the router broke off; who judges decides whether that
was excused. Every try ends by its deadline and a grace: what has said nothing by then is written down as silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from baton.deadline import now_s
from baton.errors import BatonError
from bench.chaos.asks import Ask
from bench.chaos.doors import Doors
from bench.chaos.said import Failed, Outcome, Piece, Said, Try

GRACE_S = 3.0
_MAX_TRIES = 40
_PAUSE_S = 0.5

Tell = Callable[[Outcome], None]
After = Callable[[Said], Awaitable[bool]]


class Load:
    """State owner: which requests may start, which run, which have ended. tell: called with every outcome.

    Nothing starts before `allow`; while `hold` lasts, nothing is sent, not even again.
    """

    def __init__(self, grpc: str, http: str, asks: Sequence[Ask], deadline_s: float, tell: Tell) -> None:
        self.outcomes: list[Outcome] = []
        self.num_started = 0
        self.num_running = 0
        self._addresses = grpc, http
        self._asks = asks
        self._deadline_s = deadline_s
        self._tell = tell
        self._allowed = 0
        self._held = False
        self._changed = asyncio.Condition()

    async def run(self, concurrency: int) -> None:
        """Ask everything; returns when all have ended, as they do within their deadlines once they are allowed."""
        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(self._client())

    async def allow(self, num_asks: int) -> None:
        """The first `num_asks` requests may start."""
        async with self._changed:
            self._allowed = min(num_asks, len(self._asks))
            self._changed.notify_all()

    async def hold(self) -> None:
        """Send nothing until `go`."""
        async with self._changed:
            self._held = True

    async def go(self) -> None:
        """Send again."""
        async with self._changed:
            self._held = False
            self._changed.notify_all()

    async def started(self, num_asks: int, timeout_s: float) -> bool:
        """Whether so many have started within the time."""
        return await self._until(lambda: self.num_started >= num_asks, timeout_s)

    async def quiet(self, timeout_s: float) -> bool:
        """Whether nothing runs any more, within the time."""
        return await self._until(lambda: self.num_running == 0, timeout_s)

    async def _until(self, reached: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(reached)
        except TimeoutError:
            return False
        return True

    async def _client(self) -> None:
        async with Doors(*self._addresses) as doors:
            while (ask := await self._next()) is not None:
                outcome = await self._ask(doors, ask)
                self.outcomes.append(outcome)
                self._tell(outcome)

    async def _next(self) -> Ask | None:
        """The next request, once it is allowed (whoever made the load allows all in the end); None if there is none left."""
        async with self._changed:
            if self.num_started < len(self._asks):
                await self._changed.wait_for(lambda: self.num_started == len(self._asks) or self._open(self.num_started))
            if self.num_started == len(self._asks):
                return None
            ask = self._asks[self.num_started]
            self.num_started += 1
            self._changed.notify_all()
            return ask

    def _open(self, number: int) -> bool:
        return number < self._allowed and not self._held

    async def _ask(self, doors: Doors, ask: Ask) -> Outcome:
        tries: list[Try] = []
        while not tries or (_send_again(tries[-1]) and len(tries) < _MAX_TRIES):
            if tries:
                await asyncio.sleep(_pause_s(tries[-1]))
            async with self._changed:
                await self._changed.wait_for(lambda: not self._held)
                self.num_running += 1
            try:
                tries.append(await attempt(doors.stream(ask, self._deadline_s), self._deadline_s))
            finally:
                async with self._changed:
                    self.num_running -= 1
                    self._changed.notify_all()
        return Outcome(ask, tuple(tries))


async def attempt(pieces: AsyncGenerator[Piece, None], deadline_s: float, after: After | None = None) -> Try:
    """Read an answer to its end, or to the end of patience. after: called after every piece; False is to leave."""
    began_s, said = now_s(), Said()
    try:
        async with asyncio.timeout(deadline_s + GRACE_S), aclosing(pieces):
            async for piece in pieces:
                said.add(piece, now_s())
                if after is not None and not await after(said):
                    return Try(began_s, now_s(), said, Failed("left", "client", "", "the client went away", 499))
    except BatonError as error:
        return Try(began_s, now_s(), said, Failed.of(error))
    except TimeoutError:
        return Try(began_s, now_s(), said, silent=True)
    return Try(began_s, now_s(), said)


def _send_again(tried: Try) -> bool:
    return tried.failed is not None and (tried.failed.refused or tried.failed.broken)


def _pause_s(tried: Try) -> float:
    return (tried.failed.retry_after_s if tried.failed else None) or _PAUSE_S
