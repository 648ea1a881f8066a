"""One sequence carried to its end: send it to a pair of nodes, pass its tokens on, and start again elsewhere after a failure.

Knows links, waiting and the deadline; what an event means is `router/life.py`'s word, what a failure asks for is
`router/failures.py`'s. Every dispatch takes new attempt numbers and a new lease, so nothing that an abandoned node still says can
reach the client. What is lost on the way (a command, an answer, a token) is found by asking: see `look`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.deadline import Deadline, now_s
from baton.errors import BatonError, DeadlineExceeded, InternalError, NodeLost, Unavailable
from baton.request import SequenceRequest, TokenEvent
from baton.telemetry import fields
from router.failures import (
    MAX_BUGS,
    MAX_LOSSES,
    UNKNOWN_ATTEMPT,
    Failure,
    casts_doubt,
    final,
    is_bug,
    is_loss,
    lease_gone,
    says_full,
    worth_another,
)
from router.fleet import Fleet
from router.group import Group, Pair, Role
from router.life import Delivery, Dispatch, Loss, SequenceLife
from router.passage import Passage, Told

log = logging.getLogger(__name__)

NO_NODES_RETRY_S = 5.0  # what a client is told to wait while nodes are being rebuilt
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.02, 1.0
_LAST_WORD_S = 0.25
_MATTERS = (Loss.DECODE_ONLY, Loss.WHOLE)


class Relay:
    """State owner: itself, on the router's loop. `run` ends with the sequence, at the latest at the deadline.

    patience_s: how long a sequence that no node has heard of waits while no pair can serve; afterwards it waits until its deadline.
    answered: whether the client has had a token of this request, be it of another sequence: then this one is not refused any more.
    only: the one pair to use (a proof): then the first failure ends it.
    """

    def __init__(
        self,
        fleet: Fleet,
        life: SequenceLife,
        deadline: Deadline,
        deliver: Callable[[Delivery], None],
        *,
        patience_s: float = 0.0,
        only: Pair | None = None,
        answered: Callable[[], bool] = lambda: False,
    ) -> None:
        self.life = life
        self.served_by: tuple[str, ...] = ()
        self._fleet = fleet
        self._deadline = deadline
        self._deliver = deliver
        self._patience_s = patience_s
        self._only = only
        self._answered = answered
        self._passage: Passage | None = None
        self._told = Told(fleet, life.request_id)
        self._avoid: set[Group] = set()
        self._full: set[Group] = set()
        self._serving: Group | None = None  # whose tokens came last, since the last dispatch or failure
        self._num_failures = 0
        self._num_bugs = self._num_losses = 0
        self._limit: asyncio.Timeout | None = None
        self._verdict: BatonError | None = None

    async def run(self) -> None:
        """Carry the sequence until it has finished or was stopped. Raises the BatonError that ends it otherwise."""
        self._fleet.enter(self.life.request_id, self)
        reason = "cancelled"
        try:
            async with asyncio.timeout(self._deadline.left_s()) as self._limit:
                while not self.life.over:
                    await self._attempt()
        except TimeoutError:
            verdict = self._verdict or self._too_late()
            reason = verdict.cause
            raise verdict from None
        except BatonError as error:
            reason = error.cause
            raise
        finally:
            self._end(reason)

    def stop(self, reason: str) -> None:
        """Nobody wants more tokens: end the sequence here and on every node that heard of it."""
        if not self.life.over:
            self.life.cancel()
            self._told.cancel_all(reason)
        self._settle(None)

    def abandon(self, error: BatonError) -> None:
        """The router goes: `run` raises `error` now, wherever it waits."""
        if self._limit is not None and not self._limit.expired() and self._verdict is None:
            self._verdict = error
            self._limit.reschedule(now_s())

    # What nodes say.

    def on_tokens(self, group: Group, event: TokenEvent) -> None:
        """Deliver what is new in an event."""
        try:
            delivery = self.life.receive(event)
        except InternalError as error:
            self._settle(Failure(group, error))
            return
        self._pass_on(group, delivery)

    def on_drawn(self, group: Group, attempt: int, output_index: int, token_id: int) -> None:
        """Deliver a token if it is new."""
        try:
            delivery = self.life.draw(attempt, output_index, token_id)
        except InternalError as error:
            self._settle(Failure(group, error))
            return
        self._pass_on(group, delivery)

    def _pass_on(self, group: Group, delivery: Delivery | None) -> None:
        if delivery is None:
            return
        if group is not self._serving:
            self._served(group)
        self._deliver(delivery)
        if self.life.over:
            self._finished_by(group)
            self._settle(None)

    def on_accepted(self, group: Group, attempt: int) -> None:
        """Let prefill start for good: a decode group has reserved room."""
        if self._passage is not None and self.life.awaits_decode(attempt):
            self._passage.accepted = True
            self._accept(self._passage)

    def on_failed(self, group: Group, attempt: int, error: BatonError) -> None:
        """Take a node's word that an attempt ended there without a finish."""
        if error.cause != UNKNOWN_ATTEMPT:  # an unknown one may still be on its way there
            self._told.ended(group, attempt)
        if lease_gone(error) and self._passage and self.life.lost(attempt) is Loss.DECODE_ONLY:
            # Prefill ends a lease when its first token ends the request: let that word, on another stream, arrive first.
            self._passage.close()
            self._passage.last_word = asyncio.get_running_loop().call_later(_LAST_WORD_S, self._weigh, group, attempt, error)
            return
        self._weigh(group, attempt, error)

    def on_known(self, group: Group, attempt: int, next_index: int) -> None:
        """A group still has an attempt, and has said all its tokens before next_index: one that is not here was lost."""
        if self.life.lacks(attempt, next_index):
            what = f"{group.name} has sent {next_index} tokens, {self.life.num_emitted} have come in order"
            self._settle(Failure(group, Unavailable(what, stage="router", node=group.name, cause="lost_tokens")))

    def on_lost(self, group: Group, error: NodeLost) -> None:
        """All that was on a group is gone, unless it comes back in the same life: so the Cancel stays owed."""
        attempt = self._told.get(group)
        if attempt is not None:
            self._weigh(group, attempt, error)

    def look(self, at_s: float) -> None:
        """Called once a beat: ask for attempts that have made no progress for suspect_s, and say again what prefill may have missed."""
        passage = self._passage
        if passage is None or passage.outcome.done():
            return
        if passage.stalled(self.life.num_emitted, at_s, self._fleet.suspect_s):
            for group, attempt in self._told.items():
                self._check(group, attempt)
            if passage.accepted:
                self._accept(passage)

    def hand_over(self, group: Group) -> bool:
        """Leave a group and go on elsewhere, as a new attempt; True if a client's sequence needed it."""
        attempt = self._told.get(group)
        if attempt is None or self._passage is None or self._passage.outcome.done():
            return False
        needed = self.life.lost(attempt) in _MATTERS
        self._weigh(group, attempt, Unavailable(f"{group.name} is taken out of use", node=group.name, stage="router", cause="handed_over"))
        if not needed:  # but it may still hold a lease that nobody reads any more
            self._told.cancel(group, "handed over")
        return needed and self._only is None

    def _check(self, group: Group, attempt: int) -> None:
        if self.life.lost(attempt) not in _MATTERS:
            return
        try:
            self._fleet.link(group).check(self.life.request_id, attempt)
        except NodeLost as error:
            self._weigh(group, attempt, error)

    def _accept(self, passage: Passage) -> None:
        if passage.pair.prefill is None:
            return
        try:
            self._fleet.link(passage.pair.prefill).accepted(passage.lease)
        except NodeLost as error:
            self.on_lost(passage.pair.prefill, error)

    def _finished_by(self, group: Group) -> None:
        """Nobody else need wait: decode for blocks that prefill will not announce, prefill for a release that got lost on its way."""
        for other, _ in self._told.items():
            if other is not group:
                self._told.cancel(other, "the sequence is finished")

    def _weigh(self, group: Group, attempt: int, error: BatonError) -> None:
        if self._passage is None or self._passage.outcome.done():
            return
        loss = self.life.lost(attempt, forgotten=error.cause == UNKNOWN_ATTEMPT)
        if loss is Loss.DECODE_ONLY and self._redirected(self._passage, Failure(group, error)):
            return
        if loss in _MATTERS:
            self._settle(Failure(group, error))

    # One dispatch after the other.

    async def _attempt(self) -> None:
        self._serving = None
        pair = await self._find_pair()
        if self.life.over:  # stopped while it waited for nodes
            return
        dispatch = self.life.dispatch(alone=pair.prefill is None)
        pulled = dispatch.prefill is not None and dispatch.decode is not None
        lease = self._fleet.chance.getrandbits(63) | 1 if pulled else 0
        outcome = asyncio.get_running_loop().create_future()
        self._passage = passage = Passage(pair, lease, outcome, self.life.num_emitted, now_s())
        self._send(passage, dispatch)
        try:
            failure = await outcome
        finally:
            passage.close()
        if failure is not None and not self.life.over:
            await self._recover(passage, failure)

    def _send(self, passage: Passage, dispatch: Dispatch) -> None:
        if dispatch.decode is not None:
            self._send_decode(passage, dispatch.decode)
        if dispatch.prefill is None or passage.outcome.done():
            return
        group = passage.pair.prefill
        assert group is not None, "a dispatch without prefill is for a decode group alone"
        try:
            self._told.tell(group, dispatch.prefill.attempt, self._num_tokens(), computes=True)
            self._fleet.link(group).prefill(dispatch.prefill, passage.lease, self._deadline.left_s())
        except NodeLost as error:
            self._settle(Failure(group, error))

    def _send_decode(self, passage: Passage, sequence: SequenceRequest) -> None:
        pair = passage.pair
        try:
            source = self._fleet.link(pair.prefill) if pair.prefill is not None else None
            self._told.tell(pair.decode, sequence.attempt, self._num_tokens(), computes=source is None)
            # Until a pull has been through, nobody knows whether the group has kept the introduction: it may have dropped its request.
            introduce = not pair.proven
            self._fleet.link(pair.decode).decode(sequence, source, passage.lease, self._deadline.left_s(), introduce=introduce)
        except NodeLost as error:
            self._settle(Failure(pair.decode, error))

    def _redirected(self, passage: Passage, failure: Failure) -> bool:
        """Have another decode group read the same lease: nothing is prefilled twice. False if that cannot be."""
        error, group = failure.error, failure.group
        if self._only or lease_gone(error) or not self._may_go_on(error):
            return False
        self._doubt(passage, error)
        if error.cause != UNKNOWN_ATTEMPT:  # that command was lost on its way, which is not the group's fault
            self._avoid.add(group)
        if says_full(error):
            self._full.add(group)
        other = self._fleet.choose(self._num_tokens(), without=self._avoid | self._full, prefill=passage.pair.prefill)
        if other is None:
            return False
        self._told.cancel(group, "redirected")
        self._note_retry(failure)
        passage.move_to(other)
        self._send_decode(passage, self.life.redirect())
        return True

    async def _recover(self, passage: Passage, failure: Failure) -> None:
        """Make ready for another dispatch, or raise the error if there is no sense in one."""
        self.life.setback()
        self._told.cancel_all(f"retry after {failure.error.cause}")
        self._doubt(passage, failure.error)
        if self._only:
            raise failure.error
        if not self._may_go_on(failure.error):
            raise final(failure.error)
        if says_full(failure.error):
            self._full.add(failure.group)
            if not self._has_answered and self._fleet.choose(self._num_tokens(), without=self._full) is None:
                raise failure.error
        self._note_retry(failure)
        self._avoid = {failure.group}
        await asyncio.sleep(min(_FIRST_BACKOFF_S * 2.0 ** min(self._num_failures, 10), _LAST_BACKOFF_S))
        self._num_failures += 1

    async def _find_pair(self) -> Pair:
        """The pair to use next, once there is one. Raises Unavailable if none can ever be, or a new sequence has waited long enough."""
        if self._only is not None:
            return self._only
        started = self.life.attempt > 0 or self._has_answered
        patience = self._deadline.sooner(min(self._patience_s, 0.9 * self._deadline.left_s()))
        while True:
            pair = self._fleet.choose(self._num_tokens(), avoid=self._avoid | self._full)
            if pair is not None:
                return pair
            self._fleet.registry.check_possible()
            if not await self._fleet.changed(None if started else patience.left_s()):
                if not self._has_answered:
                    raise no_nodes(self._fleet)
                started = True  # another sequence of the request has had a token meanwhile

    @property
    def _has_answered(self) -> bool:
        return self.life.num_emitted > 0 or self._answered()

    def _may_go_on(self, error: BatonError) -> bool:
        if is_bug(error):
            return self._num_bugs < MAX_BUGS
        return worth_another(error) and not (is_loss(error) and self._num_losses + 1 >= MAX_LOSSES)

    def _doubt(self, passage: Passage, error: BatonError) -> None:
        """Have the pair proven again, if these lives of it have failed, and not merely for want of time: then the deadline has passed."""
        pair = passage.pair
        if casts_doubt(error) and pair.lives == passage.lives and not self._deadline.passed():
            pair.proven = False
            pair.last_error = error.message
            self._fleet.notify()

    def _num_tokens(self) -> int:
        return len(self.life.prompt_ids) + self.life.num_emitted

    def _served(self, group: Group) -> None:
        """Remember who served. Once decode makes progress, whoever was full may not be; prefill's one token says nothing about that."""
        self._serving = group
        if group.role is Role.DECODE:
            self._num_failures = self._num_bugs = self._num_losses = 0
            self._full.clear()
        if group.name not in self.served_by:
            self.served_by += (group.name,)

    def _settle(self, failure: Failure | None) -> None:
        """The dispatch under way, if there is one, has come to its end."""
        if self._passage is not None:
            self._passage.settle(failure)

    def _end(self, reason: str) -> None:
        self._limit = None
        self._fleet.leave(self.life.request_id)
        if not self.life.over:
            self.life.fail()
            self._told.cancel_all(reason)

    def _note_retry(self, failure: Failure) -> None:
        error = failure.error
        self._serving = None
        self._num_bugs += is_bug(error)
        self._num_losses += is_loss(error)
        if not self._only:
            self._fleet.metrics.retry(error.cause)
        log.warning(
            "retrying a sequence",
            extra=fields(request=self.life.request_id, node=failure.group.name, cause=error.cause, why=error.message),
        )

    def _too_late(self) -> DeadlineExceeded:
        where = self._passage.pair.name if self._passage else "no pair of nodes yet"
        waited = f"it had made {self.life.num_emitted} of at most {self.life.sampling.max_tokens} tokens ({where})"
        standing = "" if any(self._fleet.registry.usable()) else f"; {self._fleet.registry.summary()}"
        return DeadlineExceeded(f"the request's deadline has passed; {waited}{standing}", stage="router")


def no_nodes(fleet: Fleet) -> Unavailable:
    """Nobody can serve now, and why: what a new request is told that has waited long enough for nodes."""
    what = f"no pair of nodes can serve: {fleet.registry.summary()}"
    return Unavailable(what, stage="router", cause="no_nodes", retry_after_s=NO_NODES_RETRY_S)
