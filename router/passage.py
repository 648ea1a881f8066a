"""What a relay has under way: the dispatch it waits for, and which groups have heard of its sequence. Decides nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.deadline import now_s
from router.failures import Failure
from router.fleet import Fleet
from router.group import Group, Pair


@dataclass(slots=True, eq=False)
class Passage:
    """One dispatch under way. Made when it is sent; ends with `outcome`: None if the sequence is over, else why the dispatch failed.

    pair, lives: who it was sent to, and in which lives. lease: its number, 0 if nobody pulls. accepted: decode has reserved room.
    seen, since_s: how many tokens there were when it was last looked at, and since when nothing has moved or been asked.
    last_word: a verdict that waits for prefill's last word; ends with the passage.
    """

    pair: Pair
    lease: int
    outcome: asyncio.Future[Failure | None]
    seen: int
    since_s: float
    lives: tuple[bytes, ...] = field(init=False)
    accepted: bool = False
    last_word: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.lives = self.pair.lives

    def move_to(self, pair: Pair) -> None:
        """Another decode group reads the lease."""
        self.pair, self.lives, self.since_s = pair, pair.lives, now_s()

    def stalled(self, num_tokens: int, at_s: float, patience_s: float) -> bool:
        """Whether there are no more tokens than `patience_s` ago; if so, the time begins anew."""
        stands = self.seen == num_tokens
        late = stands and at_s - self.since_s >= patience_s
        if late or not stands:
            self.seen, self.since_s = num_tokens, at_s
        return late

    def settle(self, failure: Failure | None) -> None:
        """It has come to its end; the first word counts."""
        if not self.outcome.done():
            self.outcome.set_result(failure)

    def close(self) -> None:
        """No timer of it acts any more."""
        if self.last_word is not None:
            self.last_word.cancel()


class Told:
    """The newest attempt of a sequence on each group. State owner: its relay.

    An entry ends when the group says that the attempt ended there, or with a Cancel, so that every node that ever heard of the
    sequence learns that it is over. A Cancel that finds no stream stays owed to the group (see `NodeLink`).
    """

    def __init__(self, fleet: Fleet, request_id: str) -> None:
        self._fleet = fleet
        self._request_id = request_id
        self._attempts: dict[Group, int] = {}

    def get(self, group: Group) -> int | None:
        """The newest attempt there."""
        return self._attempts.get(group)

    def items(self) -> tuple[tuple[Group, int], ...]:
        """All of them as they are now, in the order they were told."""
        return tuple(self._attempts.items())

    def tell(self, group: Group, attempt: int, num_tokens: int, *, computes: bool) -> None:
        """The group is about to hear of an attempt with so many tokens, and computes its prompt or not."""
        self._attempts[group] = attempt
        group.sent_sequences += 1
        group.sent_tokens += num_tokens
        group.sent_prompt_tokens += num_tokens if computes else 0

    def ended(self, group: Group, attempt: int) -> None:
        """The attempt is over there, as the group itself says."""
        if self._attempts.get(group) == attempt:
            del self._attempts[group]

    def cancel(self, group: Group, reason: str) -> None:
        """Nobody wants more of it from this group."""
        attempt = self._attempts.pop(group, None)
        if attempt is not None:
            self._fleet.cancel(group, self._request_id, attempt, reason)

    def cancel_all(self, reason: str) -> None:
        """Nobody wants more of it from any group."""
        for group, _ in self.items():
            self.cancel(group, reason)
