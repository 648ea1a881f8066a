"""What a step costs a leader beside its computation: decode's by batch size and by how many sequences wait, prefill's by how many wait.

No model: steps draw made-up tokens. Decode's cost is split: what no rank computes during (plan and apply), and what is done while the next
step is computed (tell: the desk, the message for the router). The issue's budget for all of it is 1 ms at 128 sequences. Every 16th step
finds all sequences at the end of their blocks at once, which is the slowest. Times are CPU seconds of this thread: nothing here waits.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np

from baton.deadline import Deadline
from baton.engine.batch import Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.errors import BatonError
from baton.request import Sampling, SequenceRequest, TokenEvent
from bench.micro.limits import Limits
from bench.micro.row import Row
from decode_node.scheduler import DecodeScheduler
from prefill_node.scheduler import PrefillScheduler
from ranks.control import event_message, load_message
from ranks.desk import Desk
from ranks.session import GroupLoad, Key, Outbox, Session

BATCHES = (1, 16, 128, 256)
WAITING = (10, 100, 1_000, 10_000)
BATCH_WITH_WAITING = 128
NUM_STEPS = 200
MAX_TOKENS = NUM_STEPS + 2  # nobody ends
BLOCK_SIZE, PROMPT_LEN, VOCAB = 16, 50, 32_000
PREFILL_STEP_TOKENS, PREFILL_STEPS = 2048, 40
BUDGET_MS, BUDGET = 1.0, "budget at 128"


def rows(limits: Limits, batches: Sequence[int] = BATCHES, waiting: Sequence[int] = WAITING) -> Iterator[Row]:
    """Milliseconds per step: medians, and of decode's also what one step in twenty takes at least."""
    for size in batches:
        yield from _decode(f"decode, batch {size}", size, 0)
    for num_waiting in waiting:
        yield from _decode(f"decode, batch {BATCH_WITH_WAITING}, {num_waiting:,} waiting", BATCH_WITH_WAITING, num_waiting)
    for num_waiting in waiting:
        yield Row(f"prefill, {num_waiting:,} waiting: plan + apply", 1e3 * statistics.median(_prefill(num_waiting)), "ms")


def _decode(what: str, size: int, waiting: int) -> Iterator[Row]:
    turns = asyncio.run(_turns(size, waiting))
    whole = [between + beside for between, beside in turns]
    yield Row(f"{what}: plan + apply + tell", 1e3 * statistics.median(whole), "ms", BUDGET_MS, BUDGET)
    yield Row(f"{what}: of it between steps", 1e3 * statistics.median(between for between, _ in turns), "ms")
    yield Row(f"{what}: one step in twenty", 1e3 * statistics.quantiles(whole, n=20)[-1], "ms")
    yield Row(f"{what}: steps without a model", 1 / statistics.median(whole), "1/s")


async def _turns(size: int, waiting: int) -> list[tuple[float, float]]:
    group = _Group(size, waiting)
    turns = [group.turn() for _ in range(NUM_STEPS)]
    group.desk.close(None)
    return turns


class _Group:
    """What a decode leader does in a step, without its rank and its pulls: `size` sequences run, others wait. Ended by its desk."""

    def __init__(self, size: int, waiting: int) -> None:
        self.desk = Desk[None]("decode", "bench", self._end, vocab_size=VOCAB)
        self._session = Session(b"r" * 16)
        self.desk.attach(self._session)
        self._pool = BlockPool(size * blocks_for(PROMPT_LEN + MAX_TOKENS, BLOCK_SIZE), BLOCK_SIZE)
        self._scheduler = DecodeScheduler(
            self._pool,
            max_sequences=size,
            max_waiting=waiting,
            reserve_output_tokens=MAX_TOKENS,
            max_step_tokens=512,
            mixed_step_tokens=64,
            max_model_len=4096,
        )
        for number in range(size):
            self._begin(_request(number))
        for number in range(size, size + waiting):
            self._scheduler.add(_request(number))

    def _begin(self, request: SequenceRequest) -> None:
        self._scheduler.add(request)
        self.desk.open(self._session, request, Deadline.after(600.0), None)
        (admitted,) = self._scheduler.admit()
        self._scheduler.bind(request.key, admitted.num_blocks - admitted.matched_blocks)
        self._scheduler.start(request.key, TokenEvent(*request.key, 0, (1,)))

    def _end(self, key: Key, error: BatonError) -> None:
        self._scheduler.cancel(key, quarantine=False)
        self.desk.forget(key)

    def turn(self) -> tuple[float, float]:
        """Seconds between two steps, and of what is done during the next one."""
        began = time.thread_time()
        batch = self._scheduler.plan(self.desk.backlogged())
        planned = time.thread_time()
        sampled = _sampled(len(batch.sample_rows))
        ended = time.thread_time()
        applied = self._scheduler.apply(sampled)
        taken_in = time.thread_time()
        self.desk.deliver_drawn(applied.drawn)
        self._scheduler.admit()
        self._message()
        return planned - began + taken_in - ended, time.thread_time() - taken_in

    def _message(self) -> bytes:
        outbox, self._session.outbox = self._session.outbox, Outbox()
        load = self._scheduler.load()
        known = GroupLoad(load.waiting, load.running, load.waiting_tokens, self._pool.counts(), 0, 0, 0, 0.0)
        return event_message(outbox, load_message(known, 0, 0)).SerializeToString()


def _prefill(waiting: int) -> list[float]:
    """Seconds of each step of short prompts, as many of which wait; whoever is done makes room for another one."""
    scheduler = PrefillScheduler(
        BlockPool(1 << 14, BLOCK_SIZE),
        max_step_tokens=PREFILL_STEP_TOKENS,
        max_sequences=64,
        max_waiting=waiting,
        max_unaccepted=4,
        max_model_len=4096,
    )
    for number in range(1, waiting + 1):
        scheduler.add(_request(number), number)
        scheduler.accept(number)
    seconds = []
    for step in range(PREFILL_STEPS):
        began = time.thread_time()
        scheduler.make_room()
        batch = scheduler.plan()
        planned = time.thread_time()
        sampled = _sampled(len(batch.sample_rows))
        ended = time.thread_time()
        outcome = scheduler.apply(sampled)
        seconds.append(planned - began + time.thread_time() - ended)
        for number, announced in enumerate(outcome.announcements, waiting + 1 + step * PREFILL_STEP_TOKENS):
            scheduler.release(announced.lease)
            scheduler.add(_request(number), number)
            scheduler.accept(number)
    return seconds


def _request(number: int) -> SequenceRequest:
    prompt = tuple((7 * number + i) % VOCAB for i in range(PROMPT_LEN))
    how = Sampling(max_tokens=MAX_TOKENS, temperature=0.0, seed=number, stop_token_ids=(VOCAB - 1,))
    return SequenceRequest(f"cmpl-{number:032x}", 1, prompt, how)


def _sampled(count: int) -> Sampled:
    """Tokens none of which ends a sequence."""
    return Sampled(np.arange(count), np.zeros(count, np.float32), np.zeros((count, 0), np.int64), np.zeros((count, 0), np.float32))
