"""What a group owes one router: events gathered during a step and sent as one message. Knows no protocol and no role."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from baton.errors import BatonError
from baton.request import BlockCounts, TokenEvent

Key = tuple[str, int]
MAX_BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class PullFacts:
    """How one pull went; seconds from opening it, exposed_s after the last announcement."""

    key: Key
    blocks_pulled: int
    blocks_matched: int
    bytes_pulled: int
    seconds: float
    exposed_s: float
    transport: str


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """A group's load: a hint for the router's policy and the figures behind /metrics."""

    waiting_sequences: int
    running_sequences: int
    waiting_tokens: int
    blocks: BlockCounts
    open_leases: int
    open_pulls: int
    steps: int
    step_seconds: float


@dataclass(slots=True)
class Outbox:
    """Events not yet sent, in order within each kind."""

    tokens: list[TokenEvent] = field(default_factory=list)
    accepted: list[Key] = field(default_factory=list)
    errors: list[tuple[Key, BatonError]] = field(default_factory=list)
    pulls: list[PullFacts] = field(default_factory=list)
    flushed: list[tuple[int, int]] = field(default_factory=list)  # the command's number, blocks freed

    def __len__(self) -> int:
        return len(self.tokens) + len(self.accepted) + len(self.errors) + len(self.pulls) + len(self.flushed)


class Session:
    """One router's stream. State owner: the leader's loop. Ends with the stream; what was not sent then is dropped.

    A router that does not read holds at most what `backlogged` lets through: the leader leaves its sequences out of the batch.
    """

    def __init__(self, router_incarnation: bytes) -> None:
        self.router_incarnation = router_incarnation
        self.outbox = Outbox()
        self.closed = False
        self._ready = asyncio.Event()

    @property
    def backlogged(self) -> bool:
        """Whether the router is too far behind to be given more tokens."""
        return len(self.outbox.tokens) > MAX_BACKLOG

    def flush(self) -> None:
        """Let what is in the outbox go out as one message."""
        if len(self.outbox):
            self._ready.set()

    def flushed(self, number: int, blocks: int) -> None:
        """Answer the FlushCache command of this number at once: so many blocks are free now that were cached."""
        self.outbox.flushed.append((number, blocks))
        self.flush()

    def close(self) -> None:
        """The stream is over."""
        self.closed = True
        self._ready.set()

    async def take(self, beat_s: float) -> Outbox:
        """The next message's content: waits until a flush, or for one beat."""
        with contextlib.suppress(TimeoutError):  # a beat goes out even when there is nothing to say
            async with asyncio.timeout(beat_s):  # not wait_for: that of Python 3.11 can swallow a cancel
                await self._ready.wait()
        self._ready.clear()
        out, self.outbox = self.outbox, Outbox()
        return out
