"""All sequences of one client's request, merged into the one stream of chunks that its client reads.

Knows relays and choices; nothing of admission or of how the request was made. A delivery becomes a chunk at once, unless the client
is behind: then it waits, as at most max_tokens ids per sequence, since no index is delivered twice, until there is room again or the
sink gives its client up. Nobody else waits for it, since nodes and relays never do.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from baton.deadline import Deadline
from baton.errors import BatonError, InternalError
from baton.request import Chunk, FinishReason, Usage
from baton.tokenizer import Tokenizer
from router.choices import Choice, Prepared, total_usage
from router.fleet import Fleet
from router.life import Delivery, SequenceLife
from router.relay import Relay
from router.sink import Sink, side_by_side

log = logging.getLogger(__name__)


class Answer:
    """State owner: itself, on the router's loop. Everything it has begun ends with `run`, here and on every node that heard of it.

    inside_id: what nodes know the request by, unique among all routers' lives, so that a client may use an id again.
    no_node_s: how long it waits at first while no pair of nodes can serve.
    """

    def __init__(
        self,
        fleet: Fleet,
        tokenizer: Tokenizer,
        prepared: Prepared,
        inside_id: str,
        deadline: Deadline,
        sink: Sink,
        *,
        no_node_s: float,
    ) -> None:
        self.first_token_s: float | None = None
        self._fleet = fleet
        self._prepared = prepared
        self._sink = sink
        self._no_node_s = no_node_s
        self._now_s = asyncio.get_running_loop().time
        self._has_room = True  # False also while something is unread
        self._unread: deque[tuple[int, Delivery]] = deque()
        self._draining: asyncio.Task[None] | None = None
        self._failure: BatonError | None = None
        self._reason: FinishReason | None = None
        self._choices = [Choice(prepared, index, tokenizer) for index in range(len(prepared.samplings))]
        self._last_token_s: list[float | None] = [None] * len(self._choices)
        self._relays = [self._relay(index, f"{inside_id}-{index}", deadline) for index in range(len(self._choices))]

    @property
    def served_by(self) -> tuple[str, ...]:
        """Every group that made tokens for any of the sequences, in order of appearance."""
        return tuple(dict.fromkeys(name for relay in self._relays for name in relay.served_by))

    def usage(self) -> Usage:
        """What the request has used so far."""
        return total_usage(self._prepared, self._choices, [relay.life.cached_tokens for relay in self._relays])

    async def run(self) -> FinishReason:
        """Carry all sequences to their end and their chunks into the sink; how the last one ended. Raises the BatonError that ends the
        request.
        """
        try:
            try:
                await side_by_side([relay.run() for relay in self._relays])
            except BatonError:
                await self._caught_up()  # what came before an error comes before it for the client, too
                raise
            await self._caught_up()
        finally:
            await self._end_draining()
        if self._failure is not None:
            raise self._failure
        assert self._reason is not None, "a relay ends with its sequence's last delivery, or raises"
        return self._reason

    async def _caught_up(self) -> None:
        if self._draining is not None:
            await self._draining

    async def _end_draining(self) -> None:
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.wait([self._draining])

    def _relay(self, index: int, inside_id: str, deadline: Deadline) -> Relay:
        life = SequenceLife(inside_id, self._prepared.prompt_ids, self._prepared.samplings[index])
        return Relay(
            self._fleet,
            life,
            deadline,
            lambda delivery: self._delivered(index, delivery),
            patience_s=self._no_node_s,
            answered=lambda: self.first_token_s is not None,
        )

    def _delivered(self, index: int, delivery: Delivery) -> None:
        now_s, last_s = self._now_s(), self._last_token_s[index]
        self._last_token_s[index] = now_s
        if last_s is not None:
            self._fleet.metrics.next_token(now_s - last_s)
        elif self.first_token_s is None:
            self.first_token_s = now_s
        if self._has_room:
            self._say(index, delivery)
            return
        self._unread.append((index, delivery))
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(), name="a client that is behind")

    async def _drain(self) -> None:
        """Until the client has caught up, or is given up."""
        try:
            while self._unread:
                await self._sink.room()
                self._has_room = True
                while self._unread and self._has_room:
                    self._say(*self._unread.popleft())
        except BatonError as error:
            self._unread.clear()
            self._abandon(error)
        self._draining = None

    def _say(self, index: int, delivery: Delivery) -> None:
        """An edge: whoever calls has a node's stream in hand, on which the tokens of others come as well."""
        choice = self._choices[index]
        if choice.finish_reason is not None:
            return  # what came after its stop string was complete, before the nodes knew
        try:
            chunk = choice.take(delivery)
            self._has_room = self._sink.put(chunk if chunk.finish_reason is None else self._last(chunk, self._relays[index]))
        except Exception as error:
            log.exception("an answer failed for a reason of ours")
            self._abandon(InternalError(f"the router failed: {error!r}", stage="router"))

    def _last(self, chunk: Chunk, relay: Relay) -> Chunk:
        relay.stop("a stop string was found")
        self._reason = chunk.finish_reason
        last = all(other.finish_reason is not None for other in self._choices)
        return chunk._replace(served_by=relay.served_by, usage=self.usage() if last else None)

    def _abandon(self, error: BatonError) -> None:
        """End what still runs with this error, and `run` in any case."""
        self._failure = error
        for relay in self._relays:
            relay.abandon(error)
