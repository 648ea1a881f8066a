"""Who asked a group for what: the attempts it has to do with, the routers they belong to, and until when. Knows no role.

An attempt's entry is made when its request arrives and gone with its end; whatever ends it (finish, error, cancel, deadline, the
router's stream, the node's own failure) goes through `end`, which the role's leader brings. What comes late is dropped by rule:
an attempt that was cancelled before it came is refused, one that is here already is not started twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, InternalError, InvalidRequest, NodeLost, ResourceExhausted, Unavailable
from baton.request import Drawn, SequenceRequest, TokenEvent
from ranks.remembered import Remembered
from ranks.session import Key, Session

log = logging.getLogger(__name__)
Facts = TypeVar("Facts")

MAX_ROUTERS = 64
# How long a Cancel is remembered: as long as a request lasts unless its client asks for more.
TOMBSTONE_S = 600.0
MAX_TOMBSTONES = 8192
MAX_FINISHED = 16_384
RETRY_AFTER_S = 1.0


@dataclass(slots=True, eq=False)
class Entry(Generic[Facts]):
    """One attempt in this group. facts: what the role needs to know about it. next_index: of the next token to be sent.

    finished: it has said its last token, with the reason.
    """

    session: Session
    deadline: Deadline
    timer: asyncio.TimerHandle
    facts: Facts
    next_index: int
    finished: bool = False


class Desk(Generic[Facts]):
    """State owner: the leader's event loop. end(key, error): have the role end one attempt, which `forget`s it.

    vocab_size: no token id reaches it. Besides the attempts that are here, the desk remembers a bounded number of Cancels (until
    TOMBSTONE_S have passed) and of attempts that ended well (for `check`). Both by router: two routers do not know of each other.
    """

    def __init__(self, stage: str, name: str, end: Callable[[Key, BatonError], None], *, vocab_size: int) -> None:
        self._stage = stage
        self._name = name
        self._end = end
        self._vocab_size = vocab_size
        self._entries: dict[str, dict[int, Entry[Facts]]] = {}  # by request and attempt
        # Dictionaries as sets that keep their order: what happens must not depend on where objects lie in memory.
        self._sessions: dict[Session, None] = {}
        self._dirty: dict[Session, None] = {}
        self._cancelled = Remembered[tuple[bytes, str], int](MAX_TOMBSTONES, TOMBSTONE_S)  # the highest attempt
        self._finished = Remembered[tuple[bytes, Key], int](MAX_FINISHED, TOMBSTONE_S)  # its next index
        self._closed: BatonError | None = None

    def __len__(self) -> int:
        return sum(len(attempts) for attempts in self._entries.values())

    # Streams.

    def attach(self, session: Session) -> None:
        """A router's stream has begun; an earlier one of the same router is over, whether or not that was noticed.

        Raises the error that closed this group if it is closed, ResourceExhausted for one router too many.
        """
        self.check_open()
        for earlier in [known for known in self._sessions if known.router_incarnation == session.router_incarnation]:
            earlier.close()
            self.detach(earlier)
        if len(self._sessions) >= MAX_ROUTERS:
            raise self._refusal(ResourceExhausted, f"{MAX_ROUTERS} routers are connected", cause="routers", retry_after_s=RETRY_AFTER_S)
        self._sessions[session] = None
        log.info("%s: router %s attached", self._name, session.router_incarnation.hex()[:8])

    def detach(self, session: Session) -> None:
        """A router's stream is over, and with it all that it asked for: nobody would hear of it. Late or doubled calls do nothing."""
        if session not in self._sessions:
            return
        del self._sessions[session]
        for key in [key for key, entry in self._all() if entry.session is session]:
            self._end(key, self._refusal(Cancelled, "the router's stream is gone"))
        self._dirty.pop(session, None)
        log.info("%s: router %s detached", self._name, session.router_incarnation.hex()[:8])

    def check_open(self) -> None:
        """Raise the error that closed this group, if it is closed."""
        if self._closed:
            raise self._closed

    def close(self, error: BatonError | None) -> BatonError:
        """End every attempt and every stream; routers are told `error`, or that the node is leaving."""
        reason = self._closed = error or self._refusal(NodeLost, "the node is shutting down")
        for key in [key for key, _ in self._all()]:
            self._end(key, reason)
        for session in self._sessions:
            session.close()
        return reason

    # Attempts.

    def admit(self, session: Session, request: SequenceRequest, time_left_s: float) -> Deadline | None:
        """Make way for an attempt: all before it end now. Its deadline; None if it is here already, and this a doubled message.

        Raises BatonError if it cannot be: this group is closed, it was cancelled before it came, or it makes no sense.
        """
        self.check_open()
        attempts = self._entries.get(request.request_id, {})
        if any(entry.session is not session for entry in attempts.values()):
            why = f"another router has a request {request.request_id} here"
            raise self._refusal(Unavailable, why, cause="request_id", retry_after_s=RETRY_AFTER_S)
        if request.attempt in attempts:
            return None
        self._check(request)
        self._check_fence(session, request, max(attempts, default=0))
        self._cancel(request.request_id, request.attempt - 1, "a later attempt has come")
        return Deadline.after(time_left_s)

    def open(self, session: Session, request: SequenceRequest, deadline: Deadline, facts: Facts) -> Entry[Facts]:
        """An attempt that was let in and taken in is under way; its deadline is watched from here on."""
        attempts = self._entries.setdefault(request.request_id, {})
        assert request.attempt not in attempts
        timer = asyncio.get_running_loop().call_at(deadline.at_s, self._deadline_passed, request.key)
        entry = attempts[request.attempt] = Entry(session, deadline, timer, facts, len(request.emitted_ids))
        return entry

    def get(self, key: Key) -> Entry[Facts] | None:
        """The entry of an attempt, if it is (still) here."""
        return self._entries.get(key[0], {}).get(key[1])

    def forget(self, key: Key, *, finished: bool = False) -> None:
        """The attempt is over. finished: it ended well, also if its last token was not the request's."""
        attempts = self._entries[key[0]]
        entry = attempts.pop(key[1])
        entry.timer.cancel()
        if not attempts:
            del self._entries[key[0]]
        if finished or entry.finished:
            self._finished.put((entry.session.router_incarnation, key), entry.next_index)

    def cancel(self, session: Session, request_id: str, attempt: int, reason: str) -> None:
        """End a router's attempt and all before it; those that are still on their way are refused when they come."""
        before = self._cancelled.get(_name_of(session, request_id)) or 0
        self._cancelled.put(_name_of(session, request_id), max(attempt, before))
        if any(entry.session is session for entry in self._entries.get(request_id, {}).values()):
            self._cancel(request_id, attempt, reason or "cancelled")

    def check(self, session: Session, request_id: str, attempt: int) -> None:
        """Tell a router how far its attempt is, or that it is not here: an error like any other, cause "unknown_attempt"."""
        key = (request_id, attempt)
        entry = self.get(key)
        finished = self._finished.get((session.router_incarnation, key))
        if entry is not None and entry.session is session:
            session.outbox.known.append((*key, entry.next_index))
        elif finished is not None:
            session.outbox.known.append((*key, finished))
        else:
            why = f"{self._name} knows no attempt {attempt} of request {request_id}"
            session.outbox.errors.append((key, self._refusal(Unavailable, why, cause="unknown_attempt")))
        session.flush()

    # Answers.

    def refuse(self, session: Session, key: Key, error: BatonError) -> None:
        """Answer an attempt with an error at once."""
        session.outbox.errors.append((key, error))
        session.flush()

    def deliver(self, event: TokenEvent) -> bool:
        """Put tokens in their router's outbox, to go with the next `flush`; False if the attempt is over."""
        entry = self.get((event.request_id, event.attempt))
        if entry is not None:
            entry.session.outbox.tokens.append(event)
            entry.next_index = event.output_index + len(event.token_ids)
            entry.finished = event.finish_reason is not None
            self._dirty[entry.session] = None
        return entry is not None

    def deliver_drawn(self, drawn: Drawn) -> None:
        """Put single tokens of many attempts in their routers' outboxes, to go with the next `flush`; those of attempts that are over
        are dropped.
        """
        entries = [self._entries.get(name, {}).get(attempt) for name, attempt in zip(drawn.request_ids, drawn.attempts, strict=True)]
        sessions: dict[Session | None, None] = {}
        for entry, output_index in zip(entries, drawn.output_indices, strict=True):
            if entry is not None:
                entry.next_index = output_index + 1
            sessions[entry.session if entry else None] = None
        for session in sessions:
            if session is not None:
                own = [entry is not None and entry.session is session for entry in entries] if len(sessions) > 1 else None
                session.outbox.drawn.extend(drawn.only(own) if own else drawn)
                self._dirty[session] = None

    def flush(self) -> None:
        """Send what a step has brought: one message per router."""
        for session in self._dirty:
            session.flush()
        self._dirty.clear()

    def backlogged(self) -> frozenset[Key]:
        """Attempts whose router does not read its events."""
        if not any(session.backlogged for session in self._sessions):
            return frozenset()
        return frozenset(key for key, entry in self._all() if entry.session.backlogged)

    def _all(self) -> Iterator[tuple[Key, Entry[Facts]]]:
        return (((name, attempt), entry) for name, attempts in self._entries.items() for attempt, entry in attempts.items())

    def _check(self, request: SequenceRequest) -> None:
        """What baton/wire.py cannot know."""
        highest = max(chain(request.prompt_ids, request.emitted_ids), default=0)
        if highest >= self._vocab_size:
            raise self._refusal(InvalidRequest, f"token id {highest} is beyond the vocabulary of {self._vocab_size}")
        if request.attempt < 1:
            raise self._refusal(InvalidRequest, "attempts are counted from 1")

    def _check_fence(self, session: Session, request: SequenceRequest, latest: int) -> None:
        fence = max(latest, self._cancelled.get(_name_of(session, request.request_id)) or 0)
        if request.attempt <= fence:
            raise self._refusal(Cancelled, f"attempts up to {fence} of request {request.request_id} were cancelled")

    def _cancel(self, request_id: str, attempt: int, reason: str) -> None:
        for number in [number for number in self._entries.get(request_id, {}) if number <= attempt]:
            self._end((request_id, number), self._refusal(Cancelled, reason))

    def _deadline_passed(self, key: Key) -> None:
        self._end(key, self._refusal(DeadlineExceeded, f"the request's deadline passed on {self._name}"))

    def _refusal(self, kind: type[BatonError], why: str, *, cause: str = "", retry_after_s: float | None = None) -> BatonError:
        return kind(why, stage=self._stage, node=self._name, cause=cause, retry_after_s=retry_after_s)


def _name_of(session: Session, request_id: str) -> tuple[bytes, str]:
    return (session.router_incarnation, request_id)


def no_token(stage: str, node: str) -> BatonError:
    """Why a sequence ends whose logits are NaN, infinite or all banned: the same would come out anywhere."""
    return InternalError(
        "no token can be drawn: the logits are not finite or all tokens are banned", stage=stage, node=node, cause="logits"
    )
