"""The rules of the decode scheduler in their plainest form: one Python object after the other, looked at in every step.

The production scheduler keeps what runs in columns; it must do the same, call by call (see test_scheduler.py). Slow on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Answer, Key, Sequence, WaitingLine, check_sequence
from baton.engine.shares import Shares
from baton.errors import InvalidRequest, ResourceExhausted
from baton.request import SequenceRequest, TokenEvent
from decode_node.outcome import Admitted, DecodeLoad
from decode_node.stages import COMPUTE, SEQUENCE_LIFE, SequenceEvent, Stage
from decode_node.step import Part, StepPlan

AGE_LIMIT = 16
RETRY_AFTER_S = 1.0


@dataclass(slots=True, eq=False)
class _Entry:
    """alone: without a lease. in_step: the planned step writes its blocks. foreign: blocks that late remote writes may still reach."""

    sequence: Sequence
    arrival: int
    alone: bool
    stage: Stage = SEQUENCE_LIFE.start
    in_step: bool = False
    foreign: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        return self.sequence.request.key

    @property
    def num_left(self) -> int:
        """Tokens whose KV is not here yet."""
        return len(self.sequence.token_ids) - self.sequence.num_computed

    def on(self, event: SequenceEvent) -> None:
        self.stage = SEQUENCE_LIFE.after(self.stage, event)


class PlainScheduler:
    """Sequences of one decode group. State owner: the group leader's loop.

    One step at a time: `plan`, `take_suspended`, run the batch, `apply`. Between plan and apply everything else may be called.
    reserve_output_tokens: blocks are reserved for so many at most. max_step_tokens: prompt tokens computed in one step.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_waiting: int,
        reserve_output_tokens: int,
        max_step_tokens: int,
        mixed_step_tokens: int,
        max_model_len: int,
        age_limit: int = AGE_LIMIT,
    ) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._reserve_output_tokens = reserve_output_tokens
        self._max_step_tokens = max_step_tokens
        self._mixed_step_tokens = min(mixed_step_tokens, max_step_tokens)
        self._max_model_len = max_model_len
        self._num_arrived = 0
        self._line = WaitingLine[_Entry](age_limit)
        self._entries: dict[str, dict[int, _Entry]] = {}  # by request and attempt, until ENDED
        self._active: dict[int, _Entry] = {}  # by arrival: ADMITTED, PULLING, COMPUTING, RUNNING
        self._planned: list[tuple[_Entry, Part]] = []  # of the step between plan and apply
        self._suspended: list[Key] = []  # until take_suspended
        self._failed: list[Key] = []  # until take_failed

    def add(self, request: SequenceRequest, *, alone: bool = False) -> None:
        """A sequence to generate, whose prompt is pulled, or computed here if it is alone.

        Raises ResourceExhausted if too many wait, InvalidRequest if it can never run here or is here.
        """
        if self.stage(request.key) is not None:
            raise InvalidRequest(f"request {request.request_id} attempt {request.attempt} is here already", stage="decode")
        num_slots = len(request.prompt_ids) + request.sampling.max_tokens
        check_sequence(request, num_slots=num_slots, max_model_len=self._max_model_len, pool=self._pool, stage="decode")
        if num_slots > self._max_model_len:
            raise InvalidRequest(
                f"request {request.request_id}: {len(request.prompt_ids)} prompt tokens and max_tokens {request.sampling.max_tokens} "
                f"make more than {self._max_model_len}",
                stage="decode",
            )
        self._check_room()
        entry = _Entry(Sequence.make(request, self._pool.block_size), self._num_arrived, alone)
        self._num_arrived += 1
        self._entries.setdefault(request.request_id, {})[request.attempt] = entry
        self._line.join(entry.arrival, entry)

    def admit(self) -> tuple[Admitted, ...]:
        """As many waiting sequences as fit now, oldest first; one that does not fit holds up no other until it was overtaken often."""
        admitted: list[Admitted] = []
        kept = sum(self._outgrown(entry.sequence) for entry in self._active.values() if entry.stage is Stage.RUNNING)

        def start(entry: _Entry) -> Answer:
            if len(self._active) >= self._max_sequences:
                return Answer.STEP_FULL
            promised = self._num_promised(entry.sequence)
            if not entry.sequence.fits(self._pool, promised + kept):
                return Answer.NO_ROOM
            began = entry.sequence.begin(self._pool, promised)
            assert began, "it needs less than what fits"
            entry.on(SequenceEvent.ADMIT_ALONE if entry.alone else SequenceEvent.ADMIT)
            self._active[entry.arrival] = entry
            admitted.append(Admitted(entry.sequence.request, entry.sequence.num_matched, self._num_prompt_blocks(entry.sequence)))
            return Answer.STARTED

        self._line.serve(start)
        return tuple(admitted)

    def stage(self, key: Key) -> Stage | None:
        """Where a sequence is; None if it is not here (any more)."""
        entry = self._entries.get(key[0], {}).get(key[1])
        return entry.stage if entry else None

    def bind(self, key: Key, count: int) -> tuple[tuple[int, int], ...]:
        """(block, generation) for the next `count` prompt blocks to be pulled, in order, out of the reservation.

        The caller stamps the generations before the first write. The sequence must be ADMITTED or PULLING; its reservation is firm now.
        """
        entry = self._entry(key)
        entry.on(SequenceEvent.BIND)
        assert 0 <= count <= self._num_prompt_blocks(entry.sequence) - len(entry.sequence.block_ids)
        return entry.sequence.extend(self._pool, count)

    def start(self, key: Key, first_token: TokenEvent) -> TokenEvent:
        """All prompt blocks are pulled and verified on every rank: the sequence joins the batch with the token prefill drew.

        Returns the event that repeats this token; if it finishes the request, the sequence is over. That the token is the one after
        prompt and emitted tokens is the pull's to check.
        """
        entry = self._entry(key)
        sequence = entry.sequence
        assert first_token.output_index == len(sequence.request.emitted_ids)
        assert len(sequence.block_ids) == self._num_prompt_blocks(sequence), "not all prompt blocks are bound"
        entry.on(SequenceEvent.PULLED)
        sequence.num_computed = len(sequence.token_ids)
        sequence.enter_tree(self._pool)
        sequence.token_ids += first_token.token_ids
        if first_token.finish_reason:
            self._end(entry, SequenceEvent.FINISH)
        return first_token

    def plan(self, blocked: AbstractSet[Key] = frozenset()) -> Batch:
        """One token for every running sequence but the `blocked` ones (no credits), then chunks of prompts; empty if there is neither.

        May suspend sequences: the caller asks `take_suspended` next.
        """
        assert not self._planned, "the step before was not applied"
        step = StepPlan()
        for entry in self._ready(Stage.RUNNING, blocked):
            # Victims are younger or the entry itself: what was planned so far stays.
            if entry.stage is Stage.RUNNING and self._has_room(entry):
                self._compute(step, entry, 1)
        budget = min(max(self._mixed_step_tokens, len(self._planned)), self._max_step_tokens) if self._planned else self._max_step_tokens
        chunks = Shares.of(budget, self._ready(Stage.COMPUTING, blocked))
        chunks.serve(math.inf)
        for entry, count in chunks.given:
            self._compute(step, entry, count)
        return step.batch()

    def take_suspended(self) -> tuple[Key, ...]:
        """Sequences suspended since the last call: their blocks are given up, and the router must be told to send them again.

        One that was only ADMITTED may have a pull open, with nothing bound and nothing read: close it without release.
        """
        suspended, self._suspended = tuple(self._suspended), []
        return suspended

    def apply(self, sampled: Sampled) -> tuple[TokenEvent, ...]:
        """The planned step is done: one event per sequence that is still wanted and whose prompt is computed.

        Those whose logits were no numbers are `take_failed`.
        """
        planned, self._planned = self._planned, []
        events: list[TokenEvent] = []
        for entry, part in planned:
            failed = part.sampled_row in sampled.failed_rows
            entry.in_step = False
            entry.sequence.num_computed = part.end
            if failed:
                entry.sequence.distrust(self._pool)
            else:
                entry.sequence.enter_tree(self._pool)
            if entry.stage is Stage.ENDING:
                self._end(entry, SequenceEvent.STEP_DONE)
            elif failed:
                self._failed.append(entry.key)
                self._end(entry, SequenceEvent.FAIL)
            elif part.sampled_row is not None:
                events.append(self._drawn(entry, sampled, part.sampled_row))
        return tuple(events)

    def take_failed(self) -> tuple[Key, ...]:
        """Sequences that ended since the last call because no token could be drawn: the router must be told."""
        failed, self._failed = tuple(self._failed), []
        return failed

    def cancel(self, key: Key, *, quarantine: bool) -> bool:
        """This attempt is over; whether it was here and not over before.

        quarantine: its bound blocks, if it is PULLING, may still be written; they wait for `quiesced`.
        Blocks that the planned step writes are given up by apply.
        """
        stage = self.stage(key)
        if stage in (None, Stage.ENDING, Stage.QUARANTINED):
            return False
        entry = self._entry(key)
        if entry.in_step:
            del self._active[entry.arrival]
            entry.on(SequenceEvent.GIVE_UP_IN_STEP)
        elif quarantine and stage is Stage.PULLING:
            self._quarantine(entry)
        else:
            self._end(entry, SequenceEvent.GIVE_UP)
        return True

    def quiesced(self, key: Key) -> None:
        """No write can land in the quarantined blocks of this sequence any more. Ignored if it has none."""
        if self.stage(key) is Stage.QUARANTINED:
            entry = self._entry(key)
            self._pool.unquarantine(entry.foreign)
            self._end(entry, SequenceEvent.QUIESCED)

    def load(self) -> DecodeLoad:
        """How busy this group is. O(sequences)."""
        computing = [entry for entry in self._active.values() if entry.stage is Stage.COMPUTING]
        running = sum(entry.stage is Stage.RUNNING for entry in self._active.values())
        return DecodeLoad(
            waiting=len(self._line),
            pulling=len(self._active) - running - len(computing),
            computing=len(computing),
            running=running,
            waiting_tokens=sum(entry.num_left for entry in (*self._line.items(), *computing)),
        )

    def idle(self) -> bool:
        """Whether there is nothing here at all: then the pool must be idle too."""
        return not self._entries

    def _check_room(self) -> None:
        limit = self._max_sequences + self._max_waiting
        if len(self._line) + len(self._active) >= limit:
            raise ResourceExhausted(
                f"{len(self._line)} sequences wait and {len(self._active)} run here, at most {limit} may",
                stage="decode",
                cause="decode_queue",
                retry_after_s=RETRY_AFTER_S,
            )

    def _entry(self, key: Key) -> _Entry:
        return self._entries[key[0]][key[1]]

    def _num_promised(self, sequence: Sequence) -> int:
        left = sequence.request.sampling.max_tokens - len(sequence.request.emitted_ids)
        return blocks_for(len(sequence.token_ids) + min(left, self._reserve_output_tokens), self._pool.block_size)

    def _outgrown(self, sequence: Sequence) -> bool:
        """Whether it has taken all that was promised, and may need more."""
        most = len(sequence.request.prompt_ids) + sequence.request.sampling.max_tokens
        return not sequence.reserved and len(sequence.block_ids) < blocks_for(most, self._pool.block_size)

    def _num_prompt_blocks(self, sequence: Sequence) -> int:
        return blocks_for(len(sequence.token_ids), self._pool.block_size)

    def _ready(self, stage: Stage, blocked: AbstractSet[Key]) -> list[_Entry]:
        return [entry for _, entry in sorted(self._active.items()) if entry.stage is stage and entry.key not in blocked]

    def _compute(self, step: StepPlan, entry: _Entry, count: int) -> None:
        self._planned.append((entry, step.add(self._pool, entry.sequence, count)))
        entry.in_step = True

    def _drawn(self, entry: _Entry, sampled: Sampled, row: int) -> TokenEvent:
        """The token after the last one; after a prompt that was computed here, with how much of it was cached."""
        sequence = entry.sequence
        cached = sequence.num_matched * self._pool.block_size if entry.stage is Stage.COMPUTING else None
        event = sequence.event(sampled, row, cached)
        entry.on(SequenceEvent.TOKEN)
        sequence.token_ids += event.token_ids
        if event.finish_reason:
            self._end(entry, SequenceEvent.FINISH)
        return event

    def _has_room(self, entry: _Entry) -> bool:
        """Make sure the next token has a slot, suspending others if it must; False if the entry itself was suspended or sits out."""
        sequence = entry.sequence
        if len(sequence.block_ids) * self._pool.block_size >= len(sequence.token_ids) or sequence.reserved:
            return True
        while not self._pool.available():
            victim = self._victim()
            if victim is None:
                return False
            self._suspended.append(victim.key)
            self._end(victim, SequenceEvent.SUSPEND)
            if victim is entry:
                return False
        return True

    def _victim(self) -> _Entry | None:
        """The youngest whose reservation is not firm yet, else the youngest that computes, unless it is the only one."""
        by_age = [entry for _, entry in sorted(self._active.items())]
        promised = [entry for entry in by_age if entry.stage is Stage.ADMITTED]
        compute = [entry for entry in by_age if entry.stage in COMPUTE]
        if promised:
            return promised[-1]
        return compute[-1] if len(compute) > 1 else None

    def _quarantine(self, entry: _Entry) -> None:
        sequence = entry.sequence
        entry.foreign = tuple(sequence.block_ids[sequence.num_matched :])
        del sequence.block_ids[sequence.num_matched :]
        self._pool.quarantine(entry.foreign)
        sequence.drop(self._pool)
        del self._active[entry.arrival]
        entry.on(SequenceEvent.GIVE_UP_IN_READ)

    def _end(self, entry: _Entry, event: SequenceEvent) -> None:
        """The sequence is over: give up its blocks."""
        if entry.stage is Stage.WAITING:
            self._line.leave(entry.arrival)
        self._active.pop(entry.arrival, None)
        entry.on(event)
        assert SEQUENCE_LIFE.ends(entry.stage)
        entry.sequence.drop(self._pool)
        request_id, attempt = entry.key
        del self._entries[request_id][attempt]
        if not self._entries[request_id]:
            del self._entries[request_id]
