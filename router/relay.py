"""One sequence carried to its end: send it to a pair of nodes, pass its tokens on, and start again elsewhere after a failure.

Knows links, waiting and the deadline; what an event means is `router/life.py`'s word. Every dispatch takes new attempt numbers
and a new lease, so nothing that an abandoned node still says can reach the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded, InternalError, LeaseLost, NodeLost, ResourceExhausted, Unavailable
from baton.request import SequenceRequest, TokenEvent
from baton.telemetry import fields
from router.fleet import Fleet
from router.life import Delivery, Dispatch, Loss, SequenceLife
from router.registry import Group, Pair, Role

log = logging.getLogger(__name__)

FIRST_PAIR_PATIENCE_S = 5.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.02, 1.0
_LAST_WORD_S = 0.25


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a dispatch came to nothing, and on which group."""

    group: Group
    error: BatonError


class Relay:
    """State owner: itself, on the router's loop. `run` ends with the sequence, at the latest at the deadline.

    told: the newest attempt of ours on each group; an entry ends when the group says that the attempt ended there, or with a
    Cancel, so that every node that ever heard of the sequence learns that it is over.
    only: the one pair to use (a proof): then the first failure ends it.
    """

    def __init__(
        self,
        fleet: Fleet,
        life: SequenceLife,
        deadline: Deadline,
        deliver: Callable[[Delivery], None],
        only: Pair | None = None,
    ) -> None:
        self.life = life
        self.served_by: tuple[str, ...] = ()
        self._fleet = fleet
        self._deadline = deadline
        self._deliver = deliver
        self._only = only
        self._pair: Pair | None = None
        self._lease = 0
        self._outcome: asyncio.Future[Failure | None] | None = None
        self._told: dict[Group, int] = {}
        self._avoid: set[Group] = set()
        self._full: set[Group] = set()
        self._num_failures = 0
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
            self._cancel_told(reason)
        self._settle(None)

    def abandon(self, error: BatonError) -> None:
        """The router goes: `run` raises `error` now, wherever it waits."""
        if self._limit is not None and self._verdict is None:
            self._verdict = error
            self._limit.reschedule(asyncio.get_running_loop().time())

    def on_tokens(self, group: Group, event: TokenEvent) -> None:
        """Deliver what is new in an event."""
        try:
            delivery = self.life.receive(event)
        except InternalError as error:
            self._settle(Failure(group, error))
            return
        if delivery is None:
            return
        self._served(group)
        self._deliver(delivery)
        if self.life.over:
            self._finished_by(group)
            self._settle(None)

    def on_accepted(self, group: Group, attempt: int) -> None:
        """Let prefill start for good: a decode group has reserved room."""
        if self._pair is None or not self.life.awaits_decode(attempt):
            return
        try:
            self._fleet.link(self._pair.prefill).accepted(self._lease)
        except NodeLost as error:
            self._settle(Failure(self._pair.prefill, error))

    def on_failed(self, group: Group, attempt: int, error: BatonError) -> None:
        """Take a node's word that an attempt ended there without a finish."""
        if self._told.get(group) == attempt:
            del self._told[group]
        if isinstance(error, LeaseLost) and self.life.lost(attempt) is Loss.DECODE_ONLY:
            # Prefill ends a lease when its first token ends the request: let that word, on another stream, arrive first.
            asyncio.get_running_loop().call_later(_LAST_WORD_S, self._weigh, group, attempt, error)
            return
        self._weigh(group, attempt, error)

    def on_lost(self, group: Group, error: NodeLost) -> None:
        """All that was on a group is gone, unless it comes back in the same life: so the Cancel stays owed."""
        attempt = self._told.get(group)
        if attempt is not None:
            self._weigh(group, attempt, error)

    def _finished_by(self, group: Group) -> None:
        """Prefill's token was the last: decode need not wait for a lease that nobody will announce."""
        if self._pair is not None and group is self._pair.prefill:
            self._cancel(self._pair.decode, "the first token was the last")

    def _weigh(self, group: Group, attempt: int, error: BatonError) -> None:
        loss = self.life.lost(attempt)
        if loss is Loss.DECODE_ONLY and self._redirected(group, error):
            return
        if loss in (Loss.DECODE_ONLY, Loss.WHOLE):
            self._settle(Failure(group, error))

    async def _attempt(self) -> None:
        pair = await self._find_pair()
        if self.life.over:  # stopped while it waited for nodes
            return
        self._pair, self._outcome = pair, asyncio.get_running_loop().create_future()
        dispatch = self.life.dispatch()
        self._lease = 0 if dispatch.decode is None else self._fleet.chance.getrandbits(63) | 1
        self._send(pair, dispatch)
        failure = await self._outcome
        if failure is not None and not self.life.over:
            await self._recover(failure)

    def _send(self, pair: Pair, dispatch: Dispatch) -> None:
        group = pair.decode
        try:
            if dispatch.decode is not None:
                self._send_decode(pair, dispatch.decode)
            group = pair.prefill
            self._tell(group, dispatch.prefill.attempt)
            self._fleet.link(group).prefill(dispatch.prefill, self._lease, self._deadline.left_s())
        except NodeLost as error:
            self._settle(Failure(group, error))

    def _send_decode(self, pair: Pair, sequence: SequenceRequest) -> None:
        source, link = self._fleet.link(pair.prefill), self._fleet.link(pair.decode)
        self._tell(pair.decode, sequence.attempt)
        # Until a pull has been through, nobody knows whether the group has kept the introduction: it may have dropped its request.
        link.decode(sequence, source, self._lease, self._deadline.left_s(), introduce=not pair.proven)

    def _redirected(self, group: Group, error: BatonError) -> bool:
        """Have another decode group read the same lease: nothing is prefilled twice. False if that cannot be."""
        if self._pair is None or self._only or isinstance(error, LeaseLost) or not error.retryable:
            return False
        self._avoid.add(group)
        if isinstance(error, ResourceExhausted):
            self._full.add(group)
        other = self._fleet.choose(self._num_tokens(), without=self._avoid | self._full, prefill=self._pair.prefill)
        if other is None:
            return False
        self._cancel(group, "redirected")
        self._note_retry(Failure(group, error))
        self._pair = other
        try:
            self._send_decode(other, self.life.redirect())
        except NodeLost as lost:
            self._settle(Failure(other.decode, lost))
        return True

    async def _recover(self, failure: Failure) -> None:
        """Make ready for another dispatch, or raise the error if there is no sense in one."""
        self.life.setback()
        self._cancel_told(f"retry after {failure.error.cause}")
        self._doubt(failure)
        if self._only or not failure.error.retryable:
            raise failure.error
        if isinstance(failure.error, ResourceExhausted):
            self._full.add(failure.group)
            if self.life.num_emitted == 0 and self._fleet.choose(self._num_tokens(), without=self._full) is None:
                raise failure.error
        self._note_retry(failure)
        self._avoid = {failure.group}
        await asyncio.sleep(min(_FIRST_BACKOFF_S * 2.0 ** min(self._num_failures, 10), _LAST_BACKOFF_S))
        self._num_failures += 1

    def _doubt(self, failure: Failure) -> None:
        """A pull that failed for no fault of its lease says that the two nodes do not reach each other: prove them again."""
        if self._pair and failure.error.stage == "pull" and not isinstance(failure.error, (LeaseLost, ResourceExhausted)):
            self._pair.proven = False
            self._pair.last_error = failure.error.message
            self._fleet.notify()

    async def _find_pair(self) -> Pair:
        if self._only is not None:
            return self._only
        started = self.life.attempt > 0
        patience = Deadline.after(min(FIRST_PAIR_PATIENCE_S, 0.9 * self._deadline.left_s()))
        while True:
            pair = self._fleet.choose(self._num_tokens(), avoid=self._avoid | self._full)
            if pair is not None:
                return pair
            if not started:
                self._fleet.registry.check_possible()
            if not await self._fleet.changed(None if started else patience.left_s()):
                raise Unavailable(f"no pair of nodes can serve: {self._fleet.registry.summary()}", stage="router", cause="no_nodes")

    def _num_tokens(self) -> int:
        return len(self.life.prompt_ids) + self.life.num_emitted

    def _served(self, group: Group) -> None:
        """Remember who served. Once decode makes progress, whoever was full may not be; prefill's one token says nothing about that."""
        if group.role is Role.DECODE:
            self._num_failures = 0
            self._full.clear()
        if group.name not in self.served_by:
            self.served_by += (group.name,)

    def _tell(self, group: Group, attempt: int) -> None:
        self._told[group] = attempt
        group.sent_sequences += 1
        group.sent_tokens += self._num_tokens()

    def _cancel(self, group: Group, reason: str) -> None:
        attempt = self._told.pop(group, None)
        if attempt is not None:
            self._fleet.cancel(group, self.life.request_id, attempt, reason)

    def _cancel_told(self, reason: str) -> None:
        for group in tuple(self._told):
            self._cancel(group, reason)

    def _settle(self, failure: Failure | None) -> None:
        """The dispatch under way has come to its end; the first word counts."""
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(failure)

    def _end(self, reason: str) -> None:
        self._fleet.leave(self.life.request_id)
        if not self.life.over:
            self.life.fail()
            self._cancel_told(reason)

    def _note_retry(self, failure: Failure) -> None:
        error = failure.error
        if not self._only:
            self._fleet.metrics.retry(error.cause)
        log.warning(
            "retrying a sequence",
            extra=fields(request=self.life.request_id, node=failure.group.name, cause=error.cause, why=error.message),
        )

    def _too_late(self) -> DeadlineExceeded:
        where = self._pair.name if self._pair else "no pair of nodes yet"
        waited = f"it had made {self.life.num_emitted} of at most {self.life.sampling.max_tokens} tokens ({where})"
        standing = "" if any(self._fleet.registry.usable()) else f"; {self._fleet.registry.summary()}"
        return DeadlineExceeded(f"the request's deadline has passed; {waited}{standing}", stage="router")
