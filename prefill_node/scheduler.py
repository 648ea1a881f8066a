"""Which prompts a prefill node computes next, and which blocks it keeps for whom. Pure: plain values in, plans out.

A prompt reserves all its blocks when it starts and takes them chunk by chunk, so one that runs never waits for another's blocks.
How the tokens of a step are shared out is in baton/engine/shares.py.
Blocks are given up only when no step writes them and no pull reads them: until then a prompt that is over is ENDING.
A prompt is *wanted* if a decode group has room for it, or if nobody will pull it. Others get what is left over: they start by an
allowance only, hold up nobody, and what they computed is taken back when a wanted one needs the room (design rule 3).
Knows no clock: leases expire when the node says so. docs/lifecycles.md draws the stages.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile

from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Answer, Key, Sequence, WaitingLine, check_sequence
from baton.engine.shares import Shares
from baton.errors import ResourceExhausted, Unavailable
from baton.lifecycle import Lifecycle
from baton.request import SequenceRequest, TokenEvent
from prefill_node.outcome import Announced, PrefillLoad, PrefillOutcome
from prefill_node.step import Chunk, Step

AGE_LIMIT = 16
RETRY_AFTER_S = 1.0


class Stage(enum.Enum):
    """Where a prompt is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"  # computed, its blocks are kept for a reader
    ENDING = "ending"  # over, but a step still writes its blocks or a pull reads them
    ENDED = "ended"


class PromptEvent(enum.Enum):
    """What can happen to a prompt."""

    START = "start"
    COMPUTE = "last chunk"
    FINISH = "last token"  # of the request, or its only one that anybody wants
    REVOKE = "revoke"
    GIVE_UP = "over while in use"
    END = "over"  # released, expired, cancelled or failed


PROMPT_LIFE = Lifecycle[Stage, PromptEvent](
    "prompt",
    Stage.WAITING,
    {
        (Stage.WAITING, PromptEvent.START): Stage.RUNNING,
        (Stage.RUNNING, PromptEvent.COMPUTE): Stage.HELD,
        (Stage.RUNNING, PromptEvent.FINISH): Stage.ENDING,
        (Stage.RUNNING, PromptEvent.GIVE_UP): Stage.ENDING,
        (Stage.HELD, PromptEvent.GIVE_UP): Stage.ENDING,
        (Stage.HELD, PromptEvent.REVOKE): Stage.WAITING,
        **{(stage, PromptEvent.END): Stage.ENDED for stage in Stage if stage is not Stage.ENDED},
    },
)


@dataclass(slots=True, eq=False)
class _Prompt:
    """accepted: a decode group has room for it. pulled: by one decode or more. in_step: the planned step writes its blocks.

    num_expected: tokens to compute, as far as could be seen when it came. drawn: the token after it, drawn once, however often the
    prompt is computed: the router may have it already.
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
    drawn: TokenEvent | None = None

    def step(self, event: PromptEvent) -> None:
        """The only way to change the stage."""
        self.stage = PROMPT_LIFE.after(self.stage, event)

    @property
    def wanted(self) -> bool:
        """Whether somebody is sure to take the result: a decode group, or the router alone."""
        return self.accepted or self.lease == 0

    @property
    def num_left(self) -> int:
        """Tokens still to be computed."""
        return len(self.sequence.token_ids) - self.sequence.num_computed


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
        self._started: set[int] = set()  # leases of those that are not WAITING
        self._unaccepted: set[int] = set()  # leases of prompts that started and are not accepted (any more), RUNNING or HELD
        self._chunks: list[Chunk[_Prompt]] = []  # of the step between plan and apply

    def add(self, request: SequenceRequest, lease: int) -> None:
        """A prompt to compute; lease 0: nobody will pull it. If a pull waits for this lease already, call `opened` next.

        Raises ResourceExhausted if too many wait, InvalidRequest if it can never run here, Unavailable while its names are in use: what
        bears them may be over for whoever asked for it, and its blocks still be read.
        """
        attempts = self._requests.get(request.request_id, {})
        if request.attempt in attempts or lease in self._leases:
            why = f"request {request.request_id} attempt {request.attempt} or its lease {lease} is here"
            raise Unavailable(why, stage="prefill", cause="in_use", retry_after_s=RETRY_AFTER_S)
        num_tokens = len(request.prompt_ids) + len(request.emitted_ids)
        check_sequence(request, num_slots=num_tokens, max_model_len=self._max_model_len, pool=self._pool, stage="prefill")
        self._check_room()
        sequence = Sequence.make(request, self._pool.block_size)
        prompt = _Prompt(sequence, lease, self._num_arrived, sequence.num_uncached(self._pool))
        self._num_arrived += 1
        self._requests.setdefault(request.request_id, {})[request.attempt] = prompt
        if lease:
            self._leases[lease] = prompt
        self._wait(prompt)

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
        """The last pull ended without release: nobody reads, and no decode group has room for it now as far as is known here.

        The lease stays for another pull, revocable until one is accepted, unless its request is over: True if it is, and its blocks
        are given up now.
        """
        prompt = self._leases.get(lease)
        if prompt is None or not prompt.pulled:
            return False
        prompt.pulled = prompt.accepted = False
        if prompt.stage in (Stage.RUNNING, Stage.HELD):
            self._unaccepted.add(lease)
        return prompt.stage is Stage.ENDING and self._end(prompt)

    def release(self, lease: int) -> None:
        """All reads of this lease have ended, for good: its blocks go to the cache."""
        prompt = self._leases.get(lease)
        if prompt is not None:
            prompt.pulled = False
            self._end(prompt)

    def cancel(self, request_id: str, attempt: int) -> None:
        """This attempt and all before it are over; the node fences their leases.

        Blocks that a step writes or an open pull reads are given up later: by apply, and by closed or release.
        """
        attempts = self._requests.get(request_id, {})
        for prompt in [prompt for number, prompt in sorted(attempts.items()) if number <= attempt]:
            self._end(prompt)

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
        elders = self._elders()
        self._line.serve_by_size(partial(self._start, shares, elders), elders, self._may_start)
        shares.serve(math.inf)
        step = Step[_Prompt]()
        for prompt, count in shares.given:
            step.add(prompt, count, self._pool)
            prompt.in_step = True
        self._chunks = step.chunks
        return step.batch()

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
            if chunk.sampled_row in sampled.failed_rows:
                prompt.sequence.distrust(self._pool)
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
        """How busy this node is. O(prompts that run)."""
        return PrefillLoad(
            waiting=len(self._line),
            running=len(self._running),
            waiting_tokens=self._line.num_tokens + sum(prompt.num_left for prompt in self._running.values()),
            leases=len(self._started),
        )

    def idle(self) -> bool:
        """Whether there is nothing here at all: then the pool must be idle too."""
        return not self._requests

    def _check_room(self) -> None:
        limit = self._max_sequences + self._max_waiting
        if len(self._line) + len(self._running) >= limit:
            why = f"{len(self._line)} prompts wait and {len(self._running)} run here, at most {limit} may"
            raise ResourceExhausted(why, stage="prefill", cause="prefill_queue", retry_after_s=RETRY_AFTER_S)

    def _elders(self) -> set[int]:
        """Who has a turn before the shorter ones: the oldest that can start, if it is older than all that run, and all before it that
        find no room: their turn has come all the same."""
        limit = min(self._running, default=math.inf)
        elders: set[int] = set()
        for prompt in takewhile(lambda prompt: prompt.arrival < limit, self._line.items()):
            if self._may_start(prompt):
                elders.add(prompt.arrival)
                if self._fits(prompt):
                    break
        return elders

    def _start(self, shares: Shares[_Prompt], elders: set[int], prompt: _Prompt) -> Answer:
        if prompt.arrival not in elders:
            shares.serve(prompt.num_expected)
        if not shares.room() or len(self._running) >= self._max_sequences:
            return Answer.STEP_FULL
        if not self._may_start(prompt):
            return Answer.NOT_YET
        if not prompt.sequence.begin(self._pool, self._num_blocks(prompt)):
            return Answer.NO_ROOM if prompt.wanted else Answer.NOT_YET
        prompt.step(PromptEvent.START)
        self._started |= {prompt.lease} if prompt.lease else set()
        self._running[prompt.arrival] = prompt
        if not prompt.wanted:
            self._unaccepted.add(prompt.lease)
        shares.give(prompt)
        return Answer.STARTED

    def _may_start(self, prompt: _Prompt) -> bool:
        return prompt.wanted or (not prompt.revoked and len(self._unaccepted) < self._max_unaccepted)

    def _num_blocks(self, prompt: _Prompt) -> int:
        return blocks_for(len(prompt.sequence.token_ids), self._pool.block_size)

    def _final(self, chunk: Chunk[_Prompt], sampled: Sampled) -> TokenEvent | None:
        """The token after a prompt whose last chunk this was; the prompt is then HELD, or ENDING if nobody needs its blocks."""
        if chunk.sampled_row is None:
            return None
        prompt, sequence = chunk.prompt, chunk.prompt.sequence
        event = prompt.drawn = prompt.drawn or sequence.event(sampled, chunk.sampled_row, sequence.num_matched * self._pool.block_size)
        del self._running[prompt.arrival]
        prompt.step(PromptEvent.FINISH if event.finish_reason or not prompt.lease else PromptEvent.COMPUTE)
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
        wanted = (prompt for prompt in self._line.first() if prompt.wanted)
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
        self._started.remove(prompt.lease)
        prompt.step(PromptEvent.REVOKE)
        self._wait(prompt)

    def _wait(self, prompt: _Prompt) -> None:
        self._line.join(prompt.arrival, prompt, size=prompt.num_expected, num_tokens=prompt.num_left)

    def _end(self, prompt: _Prompt) -> bool:
        """The prompt is over: give up its blocks now, True, or as soon as no step writes and no pull reads them."""
        if prompt.stage is Stage.WAITING:
            self._line.leave(prompt.arrival)
        self._running.pop(prompt.arrival, None)
        self._unaccepted.discard(prompt.lease)
        if prompt.stage is not Stage.WAITING and (prompt.in_step or prompt.pulled):
            if prompt.stage is not Stage.ENDING:
                prompt.step(PromptEvent.GIVE_UP)
            return False
        prompt.step(PromptEvent.END)
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
        self._started.discard(prompt.lease)
