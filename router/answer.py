"""All sequences of one client's request, merged into the one stream of chunks that its client reads.

Knows relays and choices; nothing of admission or of how the request was made. A delivery waits in the queue until the client
reads: at most max_tokens ids per sequence, since no index is delivered twice. The queue ends with the answer, or when its client
has left it unread for slow_client_s; nobody else waits for it, since nodes and relays never do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Cancelled, InternalError
from baton.request import Chunk, Usage
from baton.tokenizer import Tokenizer
from router.choices import Choice, Prepared, total_usage
from router.fleet import Fleet
from router.life import Delivery, SequenceLife
from router.relay import Relay

log = logging.getLogger(__name__)


class Answer:
    """State owner: the iterator of `chunks`. Whoever made it must `close` it: that ends everything everywhere.

    inside_id: what nodes know the request by, unique among all routers' lives, so that a client may use an id again.
    no_node_s: how long it waits at first while no pair of nodes can serve.
    on_abandoned: called once if the client leaves its stream unread for slow_client_s.
    """

    def __init__(
        self,
        fleet: Fleet,
        tokenizer: Tokenizer,
        prepared: Prepared,
        inside_id: str,
        deadline: Deadline,
        *,
        no_node_s: float,
        slow_client_s: float,
        on_abandoned: Callable[[], None],
    ) -> None:
        self.first_token_s: float | None = None
        self._fleet = fleet
        self._prepared = prepared
        self._no_node_s = no_node_s
        self._slow_client_s = slow_client_s
        self._on_abandoned = on_abandoned
        self._abandoned = False
        self._queue: asyncio.Queue[tuple[int, Delivery | BatonError]] = asyncio.Queue()
        self._choices = [Choice(prepared, index, tokenizer) for index in range(len(prepared.samplings))]
        self._last_token_s: list[float | None] = [None] * len(self._choices)
        self._relays = [self._relay(index, f"{inside_id}-{index}", deadline) for index in range(len(self._choices))]
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def served_by(self) -> tuple[str, ...]:
        """Every group that made tokens for any of the sequences, in order of appearance."""
        return tuple(dict.fromkeys(name for relay in self._relays for name in relay.served_by))

    def usage(self) -> Usage:
        """What the request has used so far."""
        return total_usage(self._prepared, self._choices, [relay.life.cached_tokens for relay in self._relays])

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The chunks, as they come. Raises the BatonError that ends the request; ends by itself once all choices have."""
        self._tasks = [asyncio.create_task(self._carry(i, relay), name=relay.life.request_id) for i, relay in enumerate(self._relays)]
        while any(choice.finish_reason is None for choice in self._choices):
            # Every relay ends by the deadline with a last delivery or an error, so this wait does too.
            index, item = await self._queue.get()
            if self._choices[index].finish_reason is not None:
                continue  # what came after its stop string was complete, before the nodes knew
            if isinstance(item, BatonError):
                raise item
            chunk = self._chunk(index, item)
            patience = asyncio.get_running_loop().call_later(self._slow_client_s, self._abandon)
            try:
                yield chunk
            finally:
                patience.cancel()
            if self._abandoned:
                raise Cancelled(f"the client left its stream unread for {self._slow_client_s:g} s", stage="router", cause="slow_client")

    async def close(self) -> None:
        """End whatever still runs, here and on every node that heard of it."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

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

    async def _carry(self, index: int, relay: Relay) -> None:
        try:
            await relay.run()
        except BatonError as error:
            self._queue.put_nowait((index, error))
        except Exception as error:
            log.exception("a relay failed for a reason of ours")
            self._queue.put_nowait((index, InternalError(f"the router failed: {error!r}", stage="router")))

    def _delivered(self, index: int, delivery: Delivery) -> None:
        now, last = now_s(), self._last_token_s[index]
        self._last_token_s[index] = now
        if last is not None:
            self._fleet.metrics.next_token(now - last)
        if self.first_token_s is None:
            self.first_token_s = now
        self._queue.put_nowait((index, delivery))

    def _chunk(self, index: int, delivery: Delivery) -> Chunk:
        choice, relay = self._choices[index], self._relays[index]
        chunk = choice.take(delivery)
        if choice.finish_reason is None:
            return chunk
        relay.stop("a stop string was found")
        last = all(other.finish_reason is not None for other in self._choices)
        return replace(chunk, served_by=relay.served_by, usage=self.usage() if last else None)

    def _abandon(self) -> None:
        self._abandoned = True
        for task in self._tasks:
            task.cancel()
        self._queue = asyncio.Queue()  # nobody will read what was in it, but whoever holds the stream may hold it for long
        self._on_abandoned()
