"""Bugs planted on purpose, to see whether the simulator finds them. Not one line of this is ever in production code.

A bug is planted for as long as its context lasts, in this process alone: either a leader of its own, or one method of a production
class replaced by a wrong one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from baton.errors import BatonError, InvalidRequest
from baton.request import SequenceRequest, TokenEvent
from decode_node.leader import DecodeLeader
from decode_node.scheduler import DecodeScheduler
from prefill_node.leader import PrefillLeader
from ranks.desk import Desk
from router.fleet import Fleet
from router.life import Delivery, SequenceLife
from router.relay import Relay
from simulator.groups import Leader, MakeLeader, SimGroup, make_leader

RELEASED_S = 0.2
Planted = AbstractContextManager[MakeLeader]


@contextmanager
def replaced(owner: type, name: str, wrong: Callable[[Any], Any]) -> Iterator[MakeLeader]:
    """One method is what `wrong` makes of the right one."""
    right = owner.__dict__[name]
    setattr(owner, name, wrong(right))
    try:
        yield make_leader
    finally:
        setattr(owner, name, right)


class HastyLeader(PrefillLeader):
    """Gives the blocks of a lease up a while after a pull has begun, whether or not it still reads."""

    def _pull_opened(self, lease: int) -> None:
        super()._pull_opened(lease)
        asyncio.get_running_loop().call_later(RELEASED_S, self.scheduler.release, lease)


def _hasty(group: SimGroup) -> Leader:
    return HastyLeader(group.seat) if group.node.role == "prefill" else make_leader(group)


@contextmanager
def released_on_a_timer() -> Iterator[MakeLeader]:
    """Lease blocks are given up on a timer, while a pull is open."""
    yield _hasty


def no_quarantine() -> Planted:
    """A decode group that gives a pull up uses its blocks again at once, while reads may still land in them."""

    def wrong(right: Any) -> Any:
        return lambda self, key, *, quarantine: right(self, key, quarantine=False)

    return replaced(DecodeScheduler, "cancel", wrong)


def quarantined_for_ever() -> Planted:
    """Nobody takes blocks out of quarantine when the reads have ended."""
    return replaced(DecodeScheduler, "quiesced", lambda right: lambda self, key: None)


def lost_cancel() -> Planted:
    """The router sends no Cancel."""
    return replaced(Fleet, "cancel", lambda right: lambda self, group, request_id, attempt, reason: None)


def no_index() -> Planted:
    """Tokens are delivered as they come, whatever index they have."""

    def wrong(right: Any) -> Any:
        def receive(self: SequenceLife, event: TokenEvent) -> Delivery | None:
            first = self.num_emitted
            delivery: Delivery | None = right(self, event)
            if delivery is None and not self.over and first:
                return Delivery(first, event.token_ids, event.logprobs)
            return delivery

        return receive

    return replaced(SequenceLife, "receive", wrong)


class FinalLeader(DecodeLeader):
    """Tells the router of a suspended sequence as of one that can never run."""

    def _suspended(self) -> BatonError:
        return InvalidRequest("all blocks are in use", stage="decode")


@contextmanager
def suspended_is_final() -> Iterator[MakeLeader]:
    """A sequence that outgrew its reservation on a full pool fails, instead of being resumed."""
    yield (
        lambda group: (
            FinalLeader(group.seat, group.reader, open_channel=group.opener) if group.node.role == "decode" else make_leader(group)
        )
    )


def doubled_command() -> Planted:
    """A command that comes twice is refused the second time, which ends what the first one began."""

    def wrong(right: Any) -> Any:
        def admit(self: Any, session: Any, request: SequenceRequest, time_left_s: float) -> Any:
            deadline = right(self, session, request, time_left_s)
            if deadline is None:
                raise InvalidRequest("it is here already", stage="desk")
            return deadline

        return admit

    return replaced(Desk, "admit", wrong)


def deaf_to_silence() -> Planted:
    """The router judges nobody's silence."""
    return replaced(Fleet, "_judge", lambda right: lambda self, group, link, now_s: None)


def never_asks() -> Planted:
    """The router never asks for an attempt that has been quiet."""
    return replaced(Relay, "look", lambda right: lambda self, at_s: None)


PLANTED: Mapping[str, Callable[[], Planted]] = {
    "released-on-a-timer": released_on_a_timer,
    "no-quarantine": no_quarantine,
    "quarantined-for-ever": quarantined_for_ever,
    "lost-cancel": lost_cancel,
    "no-index": no_index,
    "suspended-is-final": suspended_is_final,
    "doubled-command": doubled_command,
    "deaf-to-silence": deaf_to_silence,
    "never-asks": never_asks,
}
