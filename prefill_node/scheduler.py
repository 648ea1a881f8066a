"""Which prompts a prefill node computes next, and which blocks it keeps for whom. Pure: plain values in, plans out.

    WAITING ──start──▶ RUNNING ──last chunk──▶ HELD ──release, expire, cancel──▶ ENDED
       ▲                                        │ │                                ▲
       └────────────────revoked─────────────────┘ └──▶ ENDING (pull open) ─────────┘

A prompt reserves all its blocks when it starts and takes them chunk by chunk, so one that runs never waits for another's blocks.
How the tokens of a step are shared out is in shares.py.
Blocks are given up only when no step writes them and no pull reads them: until then a prompt that is over is ENDING.
Knows no clock: leases expire when the node says so.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from baton.engine.batch import Batch, Row, Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Answer, Key, Sequence, WaitingLine, check_sequence
from baton.errors import InvalidRequest, ResourceExhausted
from baton.request import SequenceRequest, TokenEvent
from prefill_node.outcome import Announced, PrefillLoad, PrefillOutcome
from prefill_node.shares import Shares

AGE_LIMIT = 16
RETRY_AFTER_S = 1.0


class Stage(enum.Enum):
    """Where a prompt is in its life; see the drawing above."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    ENDING = "ending"
    ENDED = "ended"


_NEXT = {
    Stage.WAITING: {Stage.RUNNING, Stage.ENDED},
    Stage.RUNNING: {Stage.HELD, Stage.ENDING, Stage.ENDED},
    Stage.HELD: {Stage.WAITING, Stage.ENDING, Stage.ENDED},
    Stage.ENDING: {Stage.ENDED},
    Stage.ENDED: set[Stage](),
}


@dataclass(slots=True, eq=False)
class _Prompt:
    """accepted: a decode group has room for it. pulled: by one decode or more. in_step: the planned step writes its blocks.

    num_expected: tokens to compute, as far as could be seen when it came.
    """

    sequence: Sequence
    lease: int
    arrival: int
    num_expected: int
    stage: Stage = Stage.WAITING
    accepted: bool = False
    revoked: bool = False
    in_step: bool = False
    pulled: bool = False
    num_announced: int = 0

    def to(self, stage: Stage) -> None:
        assert stage in _NEXT[self.stage], f"a prompt does not go from {self.stage} to {stage}"
        self.stage = stage

    @property
    def wanted(self) -> bool:
        """Whether somebody is sure to take the result: a decode group, or the router alone."""
        return self.accepted or self.lease == 0

    @property
    def num_left(self) -> int:
        """Tokens still to be computed."""
        return len(self.sequence.token_ids) - self.sequence.num_computed


@dataclass(frozen=True, slots=True)
class _Chunk:
    prompt: _Prompt
    end: int
    sampled_row: int | None


@dataclass(slots=True)
class _Step:
    """A step being planned."""

    rows: list[Row] = field(default_factory=list)
    chunks: list[_Chunk] = field(default_factory=list)
    new_blocks: list[tuple[int, int]] = field(default_factory=list)
    num_sampled: int = 0


class PrefillScheduler:
    """Prompts of one prefill node. State owner: the prefill leader's loop.

    One step at a time: `make_room`, `plan`, run the batch, `apply`. Between plan and apply everything else may be called.
    Messages about leases and requests that are not here are ignored: they are late, or were never ours.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_step_tokens: int,
        max_sequences: int,
        max_waiting: int,
        max_unaccepted: int,
        max_model_len: int,
        age_limit: int = AGE_LIMIT,
    ) -> None:
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._max_unaccepted = max_unaccepted
        self._max_model_len = max_model_len
        self._num_arrived = 0
        self._line = WaitingLine[_Prompt](age_limit)
        self._running: dict[int, _Prompt] = {}  # by arrival, while RUNNING
        self._requests: dict[str, dict[int, _Prompt]] = {}  # by request and attempt, until ENDED
        self._leases: dict[int, _Prompt] = {}  # those that have one, until ENDED
        self._unaccepted: set[int] = set()  # leases of prompts that started before they were accepted, RUNNING or HELD
        self._chunks: list[_Chunk] = []  # of the step between plan and apply

    def add(self, request: SequenceRequest, lease: int) -> None:
        """A prompt to compute; lease 0: nobody will pull it. If a pull waits for this lease already, call `opened` next.

        Raises ResourceExhausted if too many wait, InvalidRequest if it can never run here or is here already.
        """
        attempts = self._requests.get(request.request_id, {})
        if request.attempt in attempts or lease in self._leases:
            raise InvalidRequest(f"request {request.request_id} attempt {request.attempt} or its lease {lease} is here", stage="prefill")
        num_tokens = len(request.prompt_ids) + len(request.emitted_ids)
        check_sequence(request, num_slots=num_tokens, max_model_len=self._max_model_len, pool=self._pool, stage="prefill")
        self._check_room()
        sequence = Sequence.make(request, self._pool.block_size)
        prompt = _Prompt(sequence, lease, self._num_arrived, sequence.num_uncached(self._pool))
        self._num_arrived += 1
        self._requests.setdefault(request.request_id, {})[request.attempt] = prompt
        if lease:
            self._leases[lease] = prompt
        self._line.join(prompt.arrival, prompt)

    def accept(self, lease: int) -> None:
        """A decode group has reserved room for the sequence of this lease (design rule 3)."""
        if lease in self._leases:
            self._leases[lease].accepted = True
            self._unaccepted.discard(lease)

    def opened(self, lease: int) -> None:
        """One more pull is open on this lease: it is accepted, not revocable, and its blocks may be under remote read."""
        self.accept(lease)
        if lease in self._leases:
            self._leases[lease].pulled = True

    def closed(self, lease: int) -> bool:
        """The last pull ended without release: nobody reads. The lease stays for another one, unless its request is over.

        True if the request is, and its blocks are given up now.
        """
        prompt = self._leases.get(lease)
        if prompt is None or not prompt.pulled:
            return False
        prompt.pulled = False
        return prompt.stage is Stage.ENDING and self._end(prompt)

    def release(self, lease: int) -> None:
        """All reads of this lease have ended, for good: its blocks go to the cache."""
        prompt = self._leases.get(lease)
        if prompt is not None:
            prompt.pulled = False
            self._end(prompt)

    def expire(self, lease: int) -> bool:
        """The lease's time is up. True if its blocks are given up now; else once its pull is closed or the step is over."""
        prompt = self._leases.get(lease)
        return prompt is None or self._end(prompt)

    def cancel(self, request_id: str, attempt: int) -> tuple[int, ...]:
        """This attempt and all before it are over. Returns their leases, which the node must now fence.

        Blocks that a step writes or an open pull reads are given up later: by apply, and by closed or release.
        """
        attempts = self._requests.get(request_id, {})
        over = [prompt for number, prompt in sorted(attempts.items()) if number <= attempt]
        for prompt in over:
            self._end(prompt)
        return tuple(prompt.lease for prompt in over if prompt.lease)

    def make_room(self) -> tuple[int, ...]:
        """Revoke leases nobody has accepted, youngest first, if a wanted prompt can then start. Call it before each `plan`.

        The node must rewind the returned leases before it yields to anything else: their blocks may be written by the
        next step. Their prompts wait until a decode group accepts them and are then computed and announced again.
        """
        prompts = (self._leases[lease] for lease in self._unaccepted)
        unwanted = sorted((prompt for prompt in prompts if prompt.stage is Stage.HELD), key=lambda prompt: -prompt.arrival)
        starved = self._starved() if unwanted else None
        if starved is None or not self._would_fit(starved, unwanted):
            return ()
        revoked: list[int] = []
        while unwanted and not self._fits(starved):
            revoked.append(unwanted[0].lease)
            self._revoke(unwanted.pop(0))
        return tuple(revoked)

    def plan(self) -> Batch:
        """The next step: chunks of prompts that run, and of new ones. Empty when nothing can run."""
        assert not self._chunks, "the step before was not applied"
        shares = Shares.of(self._max_step_tokens, list(self._running.values()))
        first = self._first_by_age()
        self._line.serve(partial(self._start, shares, first), lambda prompt: (prompt is not first, prompt.num_expected, prompt.arrival))
        shares.serve(math.inf)
        step = _Step()
        for prompt, count in shares.given:
            self._add_chunk(step, prompt, count)
        self._chunks = step.chunks
        return Batch.build(step.rows, step.new_blocks)

    def apply(self, sampled: Sampled) -> PrefillOutcome:
        """The planned step is done: what it drew and which blocks became readable."""
        chunks, self._chunks = self._chunks, []
        events: list[TokenEvent] = []
        announcements: list[Announced] = []
        ended: list[int] = []
        failed: list[Key] = []
        for chunk in chunks:
            prompt = chunk.prompt
            prompt.in_step = False
            prompt.sequence.num_computed = chunk.end
            if chunk.sampled_row in sampled.failed_rows:  # what it wrote must not reach others through the tree
                failed += [prompt.sequence.request.key] if prompt.stage is Stage.RUNNING else []
                self._end(prompt)
                continue
            prompt.sequence.enter_tree(self._pool)
            if prompt.stage is Stage.RUNNING:
                final = self._final(chunk, sampled)
                events += [final] if final else []
                announcements += self._announce(prompt, final)
            if prompt.stage is Stage.ENDING and self._end(prompt) and prompt.lease:
                ended.append(prompt.lease)
        return PrefillOutcome(tuple(events), tuple(announcements), tuple(ended), tuple(failed))

    def load(self) -> PrefillLoad:
        """How busy this node is. O(prompts)."""
        unfinished = [*self._line.items(), *self._running.values()]
        return PrefillLoad(
            waiting=len(self._line),
            running=len(self._running),
            waiting_tokens=sum(prompt.num_left for prompt in unfinished),
            leases=sum(prompt.stage is not Stage.WAITING for prompt in self._leases.values()),
        )

    def idle(self) -> bool:
        """Whether there is nothing here at all: then the pool must be idle too."""
        return not self._requests

    def _check_room(self) -> None:
        limit = self._max_sequences + self._max_waiting
        if len(self._line) + len(self._running) >= limit:
            raise ResourceExhausted(
                f"{len(self._line)} prompts wait and {len(self._running)} run here, at most {limit} may",
                stage="prefill",
                cause="prefill_queue",
                retry_after_s=RETRY_AFTER_S,
            )

    def _first_by_age(self) -> _Prompt | None:
        """The waiting prompt that is older than all that run: its turn is before that of shorter ones."""
        oldest = next((prompt for prompt in self._line.items() if self._may_start(prompt)), None)
        return oldest if oldest and all(oldest.arrival < arrival for arrival in self._running) else None

    def _start(self, shares: Shares[_Prompt], first: _Prompt | None, prompt: _Prompt) -> Answer:
        if prompt is not first:
            shares.serve(prompt.num_expected)
        if not shares.room() or len(self._running) >= self._max_sequences:
            return Answer.STEP_FULL
        if not self._may_start(prompt):
            return Answer.NOT_YET
        if not prompt.sequence.begin(self._pool, self._num_blocks(prompt)):
            return Answer.NO_ROOM
        prompt.to(Stage.RUNNING)
        self._running[prompt.arrival] = prompt
        if not prompt.wanted:
            self._unaccepted.add(prompt.lease)
        shares.give(prompt)
        return Answer.STARTED

    def _may_start(self, prompt: _Prompt) -> bool:
        return prompt.wanted or (not prompt.revoked and len(self._unaccepted) < self._max_unaccepted)

    def _num_blocks(self, prompt: _Prompt) -> int:
        return blocks_for(len(prompt.sequence.token_ids), self._pool.block_size)

    def _add_chunk(self, step: _Step, prompt: _Prompt, count: int) -> None:
        sequence = prompt.sequence
        start, end = sequence.num_computed, sequence.num_computed + count
        last = end == len(sequence.token_ids)
        step.new_blocks += sequence.extend(self._pool, blocks_for(end, self._pool.block_size) - len(sequence.block_ids))
        step.rows.append(Row(sequence.token_ids[start:end], start, tuple(sequence.block_ids), sequence.sample_row() if last else None))
        step.chunks.append(_Chunk(prompt, end, step.num_sampled if last else None))
        step.num_sampled += last
        prompt.in_step = True

    def _final(self, chunk: _Chunk, sampled: Sampled) -> TokenEvent | None:
        """The token after a prompt whose last chunk this was; the prompt is then HELD, or ENDING if nobody needs its blocks."""
        if chunk.sampled_row is None:
            return None
        prompt, sequence = chunk.prompt, chunk.prompt.sequence
        event = sequence.event(sampled, chunk.sampled_row, sequence.num_matched * self._pool.block_size)
        del self._running[prompt.arrival]
        prompt.to(Stage.ENDING if event.finish_reason or not prompt.lease else Stage.HELD)
        return event

    def _announce(self, prompt: _Prompt, final: TokenEvent | None) -> Iterator[Announced]:
        first, size = prompt.num_announced, self._pool.block_size
        end = blocks_for(prompt.sequence.num_computed, size) if final else prompt.sequence.num_computed // size
        if prompt.stage is Stage.ENDING and not prompt.pulled:
            end = first
        prompt.num_announced = end
        if prompt.lease and (final or end > first):
            blocks = prompt.sequence.block_ids[first:end]
            yield Announced(prompt.lease, first, tuple((block, self._pool.generation(block)) for block in blocks), final)

    def _starved(self) -> _Prompt | None:
        """The oldest wanted prompt, of those whose turn it would be, that could start but for its blocks."""
        wanted = (prompt for prompt in self._line.items() if prompt.wanted)
        in_turn = islice(wanted, self._max_sequences - len(self._running))
        return next((prompt for prompt in in_turn if not self._fits(prompt)), None)

    def _fits(self, prompt: _Prompt) -> bool:
        return prompt.sequence.fits(self._pool, self._num_blocks(prompt))

    def _would_fit(self, starved: _Prompt, unwanted: list[_Prompt]) -> bool:
        gained = sum(len(prompt.sequence.block_ids) for prompt in unwanted)
        return starved.sequence.fits(self._pool, self._num_blocks(starved) - gained)

    def _revoke(self, prompt: _Prompt) -> None:
        prompt.sequence.drop(self._pool)
        prompt.num_announced = 0
        prompt.revoked = True
        self._unaccepted.remove(prompt.lease)
        prompt.to(Stage.WAITING)
        self._line.join(prompt.arrival, prompt)

    def _end(self, prompt: _Prompt) -> bool:
        """The prompt is over: give up its blocks now, True, or as soon as no step writes and no pull reads them."""
        if prompt.stage is Stage.WAITING:
            self._line.leave(prompt.arrival)
        self._running.pop(prompt.arrival, None)
        self._unaccepted.discard(prompt.lease)
        if prompt.stage is not Stage.WAITING and (prompt.in_step or prompt.pulled):
            if prompt.stage is not Stage.ENDING:
                prompt.to(Stage.ENDING)
            return False
        prompt.to(Stage.ENDED)
        prompt.sequence.drop(self._pool)
        self._forget(prompt)
        return True

    def _forget(self, prompt: _Prompt) -> None:
        request = prompt.sequence.request
        attempts = self._requests[request.request_id]
        del attempts[request.attempt]
        if not attempts:
            del self._requests[request.request_id]
        self._leases.pop(prompt.lease, None)
