"""Who asked a group for what: the attempts it has to do with, the routers they belong to, and until when. Knows no role.

An attempt's entry is made when its request arrives and gone with its end; whatever ends it (finish, error, cancel, deadline, the
router's stream, the node's own failure) goes through `end`, which the role's leader brings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, InternalError, NodeLost
from baton.request import TokenEvent
from ranks.session import Key, Session

log = logging.getLogger(__name__)
Facts = TypeVar("Facts")


@dataclass(frozen=True, slots=True)
class Entry(Generic[Facts]):
    """One attempt in this group. facts: what the role needs to know about it."""

    session: Session
    deadline: Deadline
    timer: asyncio.TimerHandle
    facts: Facts


class Desk(Generic[Facts]):
    """State owner: the leader's event loop. end(key, error): have the role end one attempt, which `forget`s it."""

    def __init__(self, stage: str, name: str, end: Callable[[Key, BatonError], None]) -> None:
        self._stage = stage
        self._name = name
        self._end = end
        self._entries: dict[Key, Entry[Facts]] = {}
        # Dictionaries as sets that keep their order: what happens must not depend on where objects lie in memory.
        self._sessions: dict[Session, None] = {}
        self._dirty: dict[Session, None] = {}
        self._closed: BatonError | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def attach(self, session: Session) -> None:
        """A router's stream has begun. Raises the error that closed this group, if it is closed."""
        self.check_open()
        self._sessions[session] = None
        log.info("%s: router %s attached", self._name, session.router_incarnation.hex()[:8])

    def detach(self, session: Session) -> None:
        """A router's stream is over, and with it all that it asked for: nobody would hear of it."""
        self._sessions.pop(session, None)
        for key in [key for key, entry in self._entries.items() if entry.session is session]:
            self._end(key, Cancelled("the router's stream is gone", stage=self._stage, node=self._name))
        self._dirty.pop(session, None)

    def check_open(self) -> None:
        """Raise the error that closed this group, if it is closed."""
        if self._closed:
            raise self._closed

    def open(self, session: Session, key: Key, time_left_s: float, facts: Facts) -> Entry[Facts]:
        """An attempt arrives; its deadline is watched from here on."""
        timer = asyncio.get_running_loop().call_later(time_left_s, self._deadline_passed, key)
        entry = self._entries[key] = Entry(session, Deadline.after(time_left_s), timer, facts)
        return entry

    def get(self, key: Key) -> Entry[Facts] | None:
        """The entry of an attempt, if it is (still) here."""
        return self._entries.get(key)

    def forget(self, key: Key) -> None:
        """The attempt is over."""
        self._entries.pop(key).timer.cancel()

    def cancel(self, request_id: str, attempt: int, reason: str) -> None:
        """End an attempt and all before it; unknown ones are none of our business any more."""
        for key in [key for key in self._entries if key[0] == request_id and key[1] <= attempt]:
            self._end(key, Cancelled(reason or "cancelled", stage=self._stage, node=self._name))

    def refuse(self, session: Session, key: Key, error: BatonError) -> None:
        """Answer an attempt with an error at once."""
        session.outbox.errors.append((key, error))
        session.flush()

    def deliver(self, event: TokenEvent) -> bool:
        """Put tokens in their router's outbox, to go with the next `flush`; False if the attempt is over."""
        entry = self._entries.get((event.request_id, event.attempt))
        if entry is not None:
            entry.session.outbox.tokens.append(event)
            self._dirty[entry.session] = None
        return entry is not None

    def flush(self) -> None:
        """Send what a step has brought: one message per router."""
        for session in self._dirty:
            session.flush()
        self._dirty.clear()

    def backlogged(self) -> frozenset[Key]:
        """Attempts whose router does not read its events."""
        if not any(session.backlogged for session in self._sessions):
            return frozenset()
        return frozenset(key for key, entry in self._entries.items() if entry.session.backlogged)

    def close(self, error: BatonError | None) -> BatonError:
        """End every attempt and every stream; routers are told `error`, or that the node is leaving."""
        reason = error or NodeLost("the node is shutting down", stage=self._stage, node=self._name)
        self._closed = reason
        for key in list(self._entries):
            self._end(key, reason)
        for session in self._sessions:
            session.close()
        return reason

    def _deadline_passed(self, key: Key) -> None:
        self._end(key, DeadlineExceeded(f"the request's deadline passed on {self._name}", stage=self._stage, node=self._name))


def no_token(stage: str, node: str) -> BatonError:
    """Why a sequence ends whose logits are NaN, infinite or all banned: the same would come out anywhere."""
    return InternalError(
        "no token can be drawn: the logits are not finite or all tokens are banned", stage=stage, node=node, cause="logits"
    )
