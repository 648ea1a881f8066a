"""One request's life from receipt to its terminal event; the `Generates` that both fronts serve.

    check ─▶ tokenise (thread) ─▶ resolve ─▶ admit (bounded, with a queue) ─▶ Answer (relays to nodes) ─▶ chunks ─▶ one log line

Knows no HTTP and no gRPC. Every wait spends from the request's one deadline. With no node in sight a request waits for a short
while (`FIRST_PAIR_PATIENCE_S`, nodes may be restarting) and then fails with Unavailable; once it has been dispatched it is
retried until its deadline.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from baton.config import BatonConfig
from baton.deadline import Deadline, now_s
from baton.errors import BatonError, DeadlineExceeded, InternalError, InvalidRequest, NotFound, Unavailable
from baton.request import SEED_BITS, Chunk, GenerateRequest, Usage
from baton.rpc import open_channel
from baton.telemetry import RouterMetrics, fields
from baton.tokenizer import Tokenizer
from router.admission import Admission, Limits, Verdict, check_prompt, check_request, resolve, sequence_seed
from router.answer import Answer
from router.choices import Prepared
from router.fleet import Fleet
from router.flush import Flushed
from router.nodes import OpenChannel
from router.prove import Prover
from router.registry import Role
from router.relay import FIRST_PAIR_PATIENCE_S
from router.schema import ModelCard
from router.status import status_of

log = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 256
FLUSH_TIMEOUT_S = 10.0
_NUM_TOKENIZER_THREADS = 2
_PROOF_TEXT = "Hello"


@dataclass(slots=True, eq=False)
class Received:
    """One request from receipt to its log line. inside_id: unique in this router's life, unlike the client's id."""

    request: GenerateRequest
    inside_id: str
    deadline: Deadline
    received_s: float
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
        beat_s: float = 1.0,
        chance: random.Random | None = None,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.tokenizer = tokenizer
        self.fleet = Fleet(RouterMetrics(), beat_s=beat_s, chance=chance, open_channel=open_channel)
        self.num_received = 0
        self._config = config
        self._created_s = int(time.time())
        self._admission = Admission(config.router.max_running, config.router.max_queue)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._threads = ThreadPoolExecutor(_NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._prover = Prover(self.fleet, tokenizer.encode(_PROOF_TEXT)[:8] or (0,))
        self._proving: asyncio.Task[None] | None = None
        self._shut: BatonError | None = None

    def start(self) -> None:
        """Begin to prove pairs."""
        self._proving = asyncio.create_task(self._prover.run(), name="prover")

    def shut(self) -> None:
        """Take no more requests and end those under way and in the queue, each with one error its client gets before the ports close."""
        self._shut = Unavailable("the cluster is shutting down", stage="router", cause="shutting_down")
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
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks, one per token step and choice; the last of a choice has its finish_reason, the very last usage.

        Raises BatonError before the first chunk or between two. Close the iterator (aclose) to cancel the request everywhere.
        """
        received = self._receive(request)
        try:
            self._check_open()
            prepared = await self._prepare(received)
            await self._admit(received)
            self._check_open()
            async with aclosing(self._answer(received, prepared)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BatonError as error:
            received.outcome = error.cause
            raise
        except Exception:
            received.outcome = InternalError.default_cause  # the front tells the client, and logs it
            raise
        finally:
            self._leave(received)
            self._account(received)

    def ready(self) -> bool:
        """Whether at least one proven pair of nodes takes requests."""
        return any(self.fleet.registry.usable())

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait for `ready`; False if that took longer than timeout_s. Raises Unavailable if waiting cannot help."""
        deadline = Deadline.after(timeout_s)
        while not self.ready():
            self.fleet.registry.check_provable()
            if not await self.fleet.changed(deadline.left_s()):
                return self.ready()
        return True

    async def drain(self, node: str, timeout_s: float) -> bool:
        """Send no new work to a node and wait until it is idle; False if it is not by then. NotFound for an unknown node."""
        groups = self.fleet.registry.drain(node)
        if not groups:
            raise self._no_node(node)
        deadline = Deadline.after(timeout_s)
        while any(group.up and not group.idle for group in groups):
            if not await self.fleet.changed(deadline.left_s()):
                return False
        return True

    async def flush_cache(self, node: str = "") -> Flushed:
        """Have all groups of a node ("": of every node that is up) forget cached prefixes that no sequence uses.

        NotFound for an unknown node; NodeLost or DeadlineExceeded, and others may have been flushed, if a group did not answer.
        """
        self._check_open()
        known = self.fleet.registry.groups()
        groups = [group for group in known if group.node == node or (not node and group.up)]
        if node and not groups:
            raise self._no_node(node)
        return await self.fleet.flush_cache(groups, FLUSH_TIMEOUT_S)

    def _no_node(self, node: str) -> NotFound:
        known = sorted({group.node for group in self.fleet.registry.groups()})
        return NotFound(f"there is no node {node!r}; known are {', '.join(known) or 'none'}", stage="router")

    def add_group(self, role: str, address: str) -> None:
        """Meet a group leader at host:port. role: "prefill" or "decode"."""
        self.fleet.add(Role(role), address)

    async def remove_group(self, address: str) -> None:
        """Forget a group; its requests go on elsewhere."""
        await self.fleet.remove(address)

    def status(self) -> dict[str, object]:
        """Groups, pairs and counts, JSON-able; what /health?verbose shows."""
        running = {"requests_running": self._admission.num_running, "requests_queued": self._admission.num_queued}
        return {"ready": self.ready(), "model": self._config.name, **running, **status_of(self.fleet.registry)}

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
        request_id = request.request_id or f"req-{self.fleet.chance.randbytes(8).hex()}"
        timeout_s = self._config.router.timeout_s if request.timeout_s is None else request.timeout_s
        return Received(
            request=replace(request, request_id=request_id),
            inside_id=f"{request_id}~{self.num_received:x}",
            deadline=Deadline.after(timeout_s),
            received_s=now_s(),
        )

    async def _prepare(self, received: Received) -> Prepared:
        request = received.request
        if request.model not in ("", self._config.name):
            raise NotFound(
                f"there is no model {request.model!r}; this cluster serves {self._config.name!r}",
                stage="router",
                cause="model_not_found",
                param="model",
            )
        if len(request.request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"request_id may have {MAX_REQUEST_ID_CHARS} characters, it has {len(request.request_id)}", param="request_id"
            )
        check_request(request, self._limits(max_model_len=self._config.max_model_len))
        prompt_ids, echo_text = await self._tokenised(request, received.deadline)
        max_model_len = await self._max_model_len(received.deadline)
        check_prompt(prompt_ids, self._limits(max_model_len))
        sampling = resolve(
            request.sampling,
            self.tokenizer.sampling_defaults,
            self.tokenizer.eos_ids,
            prompt_len=len(prompt_ids),
            max_model_len=max_model_len,
            default_max_tokens=request.default_max_tokens,
            drawn_seed=self.fleet.chance.getrandbits(SEED_BITS),
        )
        return Prepared(
            request_id=request.request_id,
            prompt_ids=prompt_ids,
            samplings=tuple(replace(sampling, seed=sequence_seed(sampling.seed, i)) for i in range(request.n)),
            stop=request.sampling.stop,
            skip_special_tokens=request.sampling.skip_special_tokens,
            echo_text=echo_text,
        )

    def _limits(self, max_model_len: int) -> Limits:
        router = self._config.router
        return Limits(max_model_len, self.tokenizer.vocab_size, max_n=router.max_n, max_timeout_s=router.max_timeout_s)

    async def _tokenised(self, request: GenerateRequest, deadline: Deadline) -> tuple[tuple[int, ...], str]:
        try:
            async with asyncio.timeout(deadline.left_s()):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._tokenise, request)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the prompt was tokenised", stage="admission") from None

    def _tokenise(self, request: GenerateRequest) -> tuple[tuple[int, ...], str]:
        """The prompt's ids, and its text if it is to be repeated. Runs in a thread; the tokenizer is safe to share."""
        prompt = request.prompt
        if prompt.messages is not None:
            ids = self.tokenizer.render_chat(prompt.messages, prompt.add_generation_prompt, prompt.template_values)
        elif prompt.text is not None:
            ids = self.tokenizer.encode(prompt.text)
        else:
            ids = prompt.token_ids or ()
        if not request.echo:
            return ids, ""
        return ids, self.tokenizer.decode(ids) if prompt.text is None else prompt.text

    async def _max_model_len(self, deadline: Deadline) -> int:
        """The cluster's limit; known once a node has joined, for which a request waits a little."""
        patience = Deadline.after(min(FIRST_PAIR_PATIENCE_S, 0.9 * deadline.left_s()))
        while (known := self.fleet.registry.max_model_len()) is None:
            self._check_open()
            self.fleet.registry.check_possible()
            if not await self.fleet.changed(patience.left_s()):
                raise Unavailable(f"no node is ready: {self.fleet.registry.summary()}", stage="router", cause="no_nodes")
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

    def _abandoned(self, received: Received) -> None:
        received.outcome = "slow_client"
        self._leave(received)

    async def _answer(self, received: Received, prepared: Prepared) -> AsyncGenerator[Chunk, None]:
        answer = Answer(
            self.fleet,
            self.tokenizer,
            prepared,
            received.inside_id,
            received.deadline,
            slow_client_s=self._config.router.slow_client_s,
            on_abandoned=lambda: self._abandoned(received),
        )
        try:
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    if chunk.usage is not None and chunk.finish_reason is not None:  # the very last
                        received.outcome = chunk.finish_reason
                    yield chunk
        finally:
            await answer.close()
            received.usage, received.served_by = answer.usage(), answer.served_by
            if answer.first_token_s is not None:
                received.first_token_s = answer.first_token_s - received.received_s

    def _account(self, received: Received) -> None:
        total_s = now_s() - received.received_s
        metrics, usage = self.fleet.metrics, received.usage
        if received.first_token_s is not None:
            metrics.first_token(received.first_token_s)
        metrics.finished(received.outcome, total_s, usage)
        log.info(
            "request over",
            extra=fields(
                request=received.request.request_id,
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
