"""What a group owes one router: events gathered during a step and sent as one message. Knows no protocol and no role."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from baton.errors import BatonError, ResourceExhausted
from baton.request import BlockCounts, Drawn, TokenEvent

Key = tuple[str, int]
MAX_BACKLOG = 4096
# More than what MAX_BACKLOG and one step of any group come to: nobody who reads at all is so far behind.
MAX_UNREAD = 32_768


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
    """Events not yet sent, in order within each kind. Whoever reads them takes tokens first, then what is said about attempts.

    drawn: tokens without anything to be said beside them, most by far; tokens: the others.
    """

    tokens: list[TokenEvent] = field(default_factory=list)
    drawn: Drawn = field(default_factory=Drawn)
    accepted: list[Key] = field(default_factory=list)
    errors: list[tuple[Key, BatonError]] = field(default_factory=list)
    pulls: list[PullFacts] = field(default_factory=list)
    flushed: list[tuple[int, int]] = field(default_factory=list)  # the command's number, blocks freed
    known: list[tuple[str, int, int]] = field(default_factory=list)  # request id, attempt, index of the next token

    def __len__(self) -> int:
        about = (self.accepted, self.errors, self.pulls, self.flushed, self.known)
        return self.num_tokens + sum(len(kind) for kind in about)

    @property
    def num_tokens(self) -> int:
        """Token events, drawn ones included."""
        return len(self.tokens) + len(self.drawn)


class Session:
    """One router's stream. State owner: the leader's loop. Ends with the stream; what was not sent then is dropped.

    A router that does not read costs bounded memory: past MAX_BACKLOG tokens (`backlogged`) its sequences are left out of the batch,
    past MAX_UNREAD events of all kinds the session is `broken` and keeps nothing more. Its stream must end then, and with it what it
    asked for. num_taken: commands read from the stream after its hello. num_written: messages that its transport has taken.
    """

    def __init__(self, router_incarnation: bytes) -> None:
        self.router_incarnation = router_incarnation
        self.outbox = Outbox()
        self.closed = False
        self.num_taken = 0
        self.num_written = 0
        self.writing = False
        self._ready = asyncio.Event()
        self._broken = asyncio.Event()

    @property
    def backlogged(self) -> bool:
        """Whether the router is too far behind to be given more tokens."""
        return self.outbox.num_tokens > MAX_BACKLOG

    def flush(self) -> None:
        """Let what is in the outbox go out as one message."""
        if len(self.outbox) > MAX_UNREAD:
            self._broken.set()
        if self._broken.is_set():
            self.outbox = Outbox()
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
        await _within(beat_s, self._ready)  # a beat goes out even when there is nothing to say
        self._ready.clear()
        out, self.outbox = self.outbox, Outbox()
        return out

    async def until_broken(self, seconds: float) -> None:
        """Wait so long. Raises ResourceExhausted as soon as the router has left more than MAX_UNREAD events unread."""
        await _within(seconds, self._broken)
        if self._broken.is_set():
            raise ResourceExhausted(f"the router has left more than {MAX_UNREAD} events unread", cause="unread_events")


async def _within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):  # not wait_for: that of Python 3.11 can swallow a cancel
            await event.wait()
