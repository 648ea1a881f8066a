"""One request's life from receipt to its terminal event; the `Generates` that both fronts serve.

    check ─▶ tokenise (thread) ─▶ resolve ─▶ admit (bounded, with a queue) ─▶ Answer (relays to nodes) ─▶ chunks ─▶ one log line

Knows no HTTP and no gRPC. Every wait spends from the request's one deadline. While no pair of nodes can serve (one is being
rebuilt), a new request waits for `router.no_node_s` in all and then fails with Unavailable; once it has been dispatched it is
retried until its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from functools import partial

from baton.config import BatonConfig
from baton.deadline import Deadline, now_s
from baton.errors import BatonError, DeadlineExceeded, InternalError, Unavailable
from baton.request import Chunk, GenerateRequest, Usage
from baton.rpc import open_channel
from baton.telemetry import RouterMetrics, fields
from baton.tokenizer import Tokenizer
from router.admission import Admission, Verdict
from router.answer import Answer
from router.choices import Prepared
from router.fleet import Fleet
from router.flush import Flushed
from router.group import Role
from router.membership import NodeReport
from router.nodes import OpenChannel
from router.notices import Notices
from router.policy import Sharing
from router.prepare import Preparer
from router.prove import Prover
from router.relay import no_nodes
from router.schema import ModelCard
from router.sink import Sink, iterated
from router.status import status_of
from router.upkeep import Drained, Upkeep

log = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 10.0
_PROOF_TEXT = "Hello"
_LOGGED_CHARS = 256


@dataclass(slots=True, eq=False)
class Received:
    """One request from receipt to its log line. inside_id: unique among all routers' lives, unlike the client's id.

    patience_s: for how long it may still wait for nodes before it was dispatched.
    """

    request: GenerateRequest
    inside_id: str
    deadline: Deadline
    received_s: float
    patience_s: float
    outcome: str = "cancelled"  # what it stays if the client just goes away
    usage: Usage = field(default_factory=Usage)
    first_token_s: float | None = None
    served_by: tuple[str, ...] = ()


class Dispatcher:
    """State owner: the router's loop. Takes requests between `start` and `close`."""

    def __init__(
        self,
        config: BatonConfig,
        tokenizer: Tokenizer,
        *,
        chance: random.Random | None = None,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.tokenizer = tokenizer
        sharing = Sharing(config.decode.max_prompt_tokens, config.decode.mixed_step_tokens)
        self.fleet = Fleet(RouterMetrics(), config.membership, sharing, chance=chance, open_channel=open_channel)
        self.num_received = 0
        self._inside_prefix = f"{self.fleet.incarnation.hex()[:8]}."
        self._config = config
        self._created_s = int(time.time())
        self._admission = Admission(config.router.max_running, config.router.max_queue)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._preparer = Preparer(config, tokenizer, self.fleet.chance)
        self._prover = Prover(self.fleet, tokenizer.encode(_PROOF_TEXT)[:8] or (0,))
        self._proving: asyncio.Task[None] | None = None
        self._upkeep = Upkeep(self.fleet, settle_s=config.membership.dead_s)
        self._num_under_way = 0
        self._quiet = asyncio.Event()
        self._closing: BatonError | None = None
        self._shut: BatonError | None = None

    def start(self) -> None:
        """Begin to prove pairs, and to judge who is silent."""
        self.fleet.start()
        self._proving = asyncio.create_task(self._prover.run(), name="prover")

    async def wind_down(self, drain_s: float) -> None:
        """Take no more requests, give those under way and in the queue drain_s seconds to finish, then `shut`."""
        self._closing = self._leaving()
        self.fleet.notify()
        with contextlib.suppress(TimeoutError):  # what is still under way then is told so
            async with asyncio.timeout(drain_s):
                while self._num_under_way and self._shut is None:
                    await self._quiet.wait()
        self.shut()

    def shut(self) -> None:
        """Take no more requests and end those under way and in the queue, each with one error its client gets before the ports close."""
        self._closing = self._shut = self._leaving()
        self._quiet.set()
        for turn in self._waiting.values():
            if not turn.done():
                turn.set_exception(self._shut)
        self.fleet.abandon_all(self._shut)
        self.fleet.notify()

    async def close(self) -> None:
        """Leave all nodes. The fronts have ended their requests before: one still under way would wait for nodes until its deadline."""
        if self._proving is not None:
            self._proving.cancel()
            await asyncio.wait([self._proving])
        await self.fleet.close()
        self._preparer.close()

    def _leaving(self) -> Unavailable:
        """Why there is no answer any more: because the cluster ends, and perhaps because its nodes did."""
        standing = "" if any(self.fleet.registry.usable()) else f"; {self.fleet.registry.summary()}"
        return Unavailable(f"the cluster is shutting down{standing}", stage="router", cause="shutting_down")

    async def answer(self, request: GenerateRequest, sink: Sink) -> None:
        """Carry one request to its end: its chunks go into the sink, one per token step and choice, as they come.

        The last chunk of a choice has its finish_reason, the very last usage. Raises BatonError before the first chunk or after any.
        Cancelling this cancels the request everywhere.
        """
        received = self._receive(request)
        try:
            if self._closing is not None:
                raise self._closing
            prepared = await self._prepare(received)
            await self._admit(received)
            self._check_open()
            await self._carry(received, prepared, sink)
        except BatonError as error:
            received.outcome = error.cause
            raise
        except Exception:
            received.outcome = InternalError.default_cause  # the front tells the client, and logs it
            raise
        finally:
            self._leave(received)
            self._account(received)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """`answer` for whoever wants to take the chunks one by one. Close the iterator (aclose) to cancel the request everywhere."""
        return iterated(partial(self.answer, request), self._config.router.slow_client_s)

    def ready(self) -> bool:
        """Whether requests are taken, and at least one proven pair of nodes, or a decode group alone, can serve them."""
        return self._closing is None and any(self.fleet.registry.usable())

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until a launch is complete (see Registry.complete); False if that took longer. Unavailable if waiting cannot help."""
        deadline = Deadline.after(timeout_s)
        while not self.fleet.registry.complete():
            self.fleet.registry.check_provable()
            if not await self.fleet.changed(deadline.left_s()):
                return self.fleet.registry.complete()
        return True

    async def drain(self, node: str, timeout_s: float, retire: bool = False) -> Drained:
        """Send no new work to a node; what is still there after timeout_s goes on elsewhere. NotFound for an unknown node.

        retire: once it is idle, have the supervisor end its processes.
        """
        return await self._upkeep.drain(node, timeout_s, retire=retire)

    def restore(self, node: str) -> None:
        """Take a drained node back into service; the supervisor builds it anew if it was retired. NotFound for an unknown node."""
        self._upkeep.restore(node)

    def report_node(self, report: NodeReport) -> None:
        """The supervisor says how a node is, for operators and for errors that clients read."""
        self._upkeep.report(report)

    @property
    def notices(self) -> Notices:
        """What the supervisor should know: whom to condemn, retire, restore."""
        return self.fleet.notices

    async def flush_cache(self, node: str = "") -> Flushed:
        """Have all groups of a node ("": of every node that is up) forget cached prefixes that no sequence uses.

        NotFound for an unknown node; NodeLost or DeadlineExceeded, and others may have been flushed, if a group did not answer.
        """
        self._check_open()
        known = self.fleet.registry.groups()
        groups = [group for group in known if group.node == node or (not node and group.up)]
        if node and not groups:
            raise self._upkeep.unknown(node)
        return await self.fleet.flush_cache(groups, FLUSH_TIMEOUT_S)

    def add_group(self, role: str, address: str) -> None:
        """Meet a group leader at host:port. role: "prefill" or "decode"."""
        self.fleet.add(Role(role), address)

    async def remove_group(self, address: str) -> None:
        """Forget a group; its requests go on elsewhere."""
        await self.fleet.remove(address)

    def status(self) -> dict[str, object]:
        """Groups, pairs and counts, JSON-able; what /health?verbose shows."""
        running = {"requests_running": self._admission.num_running, "requests_queued": self._admission.num_queued}
        closing = {"summary": self._closing.message} if self._closing else {}
        return {"ready": self.ready(), "model": self._config.name, **running, **status_of(self.fleet.registry), **closing}

    def metrics(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return self.fleet.metrics.render()

    def model_card(self) -> ModelCard:
        """The one model served. max_model_len is the least of all ready groups', the configured one while there is none."""
        return ModelCard(self._config.name, self.fleet.registry.max_model_len() or self._config.max_model_len, self._created_s)

    def dtype(self) -> str:
        """Of the model as the nodes run it; "" while none has joined."""
        return next((group.hello.dtype for group in self.fleet.registry.groups() if group.hello), "")

    @property
    def num_running(self) -> int:
        """Requests admitted and not over."""
        return self._admission.num_running

    def _check_open(self) -> None:
        if self._shut is not None:
            raise self._shut

    def _receive(self, request: GenerateRequest) -> Received:
        self.num_received += 1
        self._num_under_way += 1
        self._quiet.clear()
        request_id = request.request_id or f"req-{self.fleet.chance.randbytes(8).hex()}"
        timeout_s = self._config.router.timeout_s if request.timeout_s is None else request.timeout_s
        return Received(
            request=replace(request, request_id=request_id),
            inside_id=f"{request_id}~{self._inside_prefix}{self.num_received:x}",
            deadline=Deadline.after(timeout_s),
            received_s=now_s(),
            patience_s=self._config.router.no_node_s,
        )

    def check(self, request: GenerateRequest) -> None:
        """Refuse at once what can be refused without its prompt's tokens. Raises InvalidRequest, or NotFound for another model."""
        self._preparer.check(request)

    async def _prepare(self, received: Received) -> Prepared:
        request = received.request
        self.check(request)
        prompt_ids, echo_text = await self._preparer.tokenised(request, received.deadline)
        return self._preparer.prepared(request, prompt_ids, echo_text, await self._max_model_len(received))

    async def _max_model_len(self, received: Received) -> int:
        """The cluster's limit; known while a node is there, for which a request waits as long as for a pair."""
        began_s = now_s()
        patience = received.deadline.sooner(min(received.patience_s, 0.9 * received.deadline.left_s()))
        while (known := self.fleet.registry.max_model_len()) is None:
            self._check_open()
            self.fleet.registry.check_possible()
            if not await self.fleet.changed(patience.left_s()):
                raise no_nodes(self.fleet)
        received.patience_s = max(0.0, received.patience_s - (now_s() - began_s))
        return known

    async def _admit(self, received: Received) -> None:
        """Take a place among the running; wait for one in the queue, at most until the deadline."""
        if self._admission.enter(received.inside_id) is Verdict.QUEUE:
            turn = self._waiting[received.inside_id] = asyncio.get_running_loop().create_future()
            self._show_load()
            try:
                async with asyncio.timeout(received.deadline.left_s()):
                    await turn
            except TimeoutError:
                queued = self._admission.num_queued
                raise DeadlineExceeded(f"the deadline passed in the router's queue, {queued} wait", stage="admission") from None
        self._show_load()

    def _leave(self, received: Received) -> None:
        """Give the place up, once or more often, and let the next in the queue have it."""
        self._waiting.pop(received.inside_id, None)
        admitted = self._admission.leave(received.inside_id)
        turn = self._waiting.pop(admitted, None) if admitted else None
        if turn is not None and not turn.done():
            turn.set_result(None)
        self._show_load()

    async def _carry(self, received: Received, prepared: Prepared, sink: Sink) -> None:
        answer = Answer(
            self.fleet,
            self.tokenizer,
            prepared,
            received.inside_id,
            received.deadline,
            sink,
            no_node_s=received.patience_s,
        )
        try:
            received.outcome = await answer.run()
        finally:
            received.usage, received.served_by = answer.usage(), answer.served_by
            if answer.first_token_s is not None:
                received.first_token_s = answer.first_token_s - received.received_s

    def _account(self, received: Received) -> None:
        self._num_under_way -= 1
        if not self._num_under_way:
            self._quiet.set()
        total_s = now_s() - received.received_s
        metrics, usage = self.fleet.metrics, received.usage
        if received.first_token_s is not None:
            metrics.first_token(received.first_token_s)
        metrics.finished(received.outcome, total_s, usage)
        log.info(
            "request over",
            extra=fields(
                request=received.request.request_id[:_LOGGED_CHARS],
                outcome=received.outcome,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                ttft_s=received.first_token_s,
                total_s=total_s,
                served_by=",".join(received.served_by),
            ),
        )

    def _show_load(self) -> None:
        self.fleet.metrics.load(self._admission.num_running, self._admission.num_queued)
