"""Clients that behave badly: too many at once, one that stops reading, some that go away. Knows how to be a bad client; no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from bench.chaos.asks import Ask
from bench.chaos.doors import Doors, http_stream
from bench.chaos.faults import Fault, Record
from bench.chaos.load import Load, attempt
from bench.chaos.said import Outcome, Said, Try
from bench.chaos.sse import EventStream

_LEAVE_AFTER = (1, 3, 9, 20)
_SLOW_LOGPROBS = 20  # so much text per token that no buffer on the way holds a whole answer
_SLOW_RECEIVE_BYTES = 2048
_READ_BEFORE_PAUSE = 2


class Guests:
    """burst: the requests they send. asked: outcomes of a whole burst, which are owed an answer like any other's.

    bad: outcomes of clients that stopped reading or left. Their answers end as they may; only wrong tokens are nobody's right.
    """

    def __init__(self, grpc: str, http: str, burst: Sequence[Ask], deadline_s: float) -> None:
        self.asked: list[Outcome] = []
        self.bad: list[Outcome] = []
        self._addresses = grpc, http
        self._burst = burst
        self._deadline_s = deadline_s

    async def fill(self, fault: Fault, record: Record) -> None:
        """The whole burst at once; returns when all have ended."""
        record.target = f"{len(self._burst)} long requests at once"
        load = Load(*self._addresses, self._burst, self._deadline_s, self.asked.append)
        await load.allow(len(self._burst))
        await load.run(len(self._burst))
        refused = sum(tried.failed is not None and tried.failed.refused for outcome in load.outcomes for tried in outcome.tries)
        record.note = f"{sum(outcome.last.finished for outcome in load.outcomes)} finished, {refused} refused and sent again"

    async def read_slowly(self, fault: Fault, record: Record) -> None:
        """Read the beginning of an answer, nothing for a while, then the rest, should it still come.

        Over HTTP with a small window: gRPC's own buffers would take the whole answer, and nobody would notice.
        """
        record.target = f"a client that stops reading for {fault.hold_s:g} s"
        ask = replace(max(self._burst, key=lambda ask: ask.max_tokens), num_logprobs=_SLOW_LOGPROBS)

        async def pause(said: Said) -> bool:
            if len(said.token_ids) == _READ_BEFORE_PAUSE:
                await asyncio.sleep(fault.hold_s)
            return True

        events = EventStream(self._addresses[1], _SLOW_RECEIVE_BYTES)
        tried = await attempt(http_stream(events, ask, self._deadline_s), self._deadline_s, pause)
        self.bad.append(Outcome(ask, (tried,)))
        ended = "finished" if tried.finished else "cut off"
        record.note = f"{ended} after {len(tried.said.token_ids)} of {ask.max_tokens} tokens, {tried.ended_s - tried.began_s:.1f} s"

    async def leave(self, fault: Fault, record: Record) -> None:
        """Some clients at once, each gone after a few tokens."""
        asks = [self._burst[(fault.number + i) % len(self._burst)] for i in range(len(_LEAVE_AFTER))]
        record.target = f"{len(asks)} clients that go away"
        async with Doors(*self._addresses) as doors:
            tries = await asyncio.gather(*(self._left(doors, ask, after) for ask, after in zip(asks, _LEAVE_AFTER, strict=True)))
        self.bad += [Outcome(ask, (tried,)) for ask, tried in zip(asks, tries, strict=True)]

    async def _left(self, doors: Doors, ask: Ask, num_tokens: int) -> Try:
        async def stay(said: Said) -> bool:
            return len(said.token_ids) < num_tokens

        return await attempt(doors.stream(ask, self._deadline_s), self._deadline_s, stay)
