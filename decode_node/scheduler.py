"""Which sequences a decode group takes in, computes next and suspends. Pure: plain values in, plans out.

A sequence with a lease has its prompt blocks pulled: it holds its cached prefix and a promise of blocks by count, which are bound as
its pull needs them. One without (no prefill node is left, or all are behind) computes its prompt here, in chunks, beside the rows of
those that run (see rows.py: columns, so that a step costs a few operations on arrays). A running sequence is in every step, chunks
share what a step has for prompts (baton/engine/shares.py).

A sequence that outgrows its promise takes from the pool; when that is full, one is suspended, and the router sends it again, as a new
attempt: first the youngest that is only ADMITTED, else the youngest that computes. **Somebody always gets on**: the oldest that
computes is never suspended. If nobody else can yield, because the rest of the pool is under pulls or in quarantine, it sits out until
those have ended, and each of them has a deadline; a block for each that has outgrown its promise is kept from whoever is let in. So it
finishes, unless an older one comes up and takes its place, and of those there are only so many.

Knows no clock and no leases. docs/lifecycles.md draws the stages.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from operator import attrgetter

import numpy as np

from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Answer, Key, Sequence, WaitingLine, check_sequence
from baton.engine.shares import Shares
from baton.errors import InvalidRequest, ResourceExhausted
from baton.request import SequenceRequest, TokenEvent
from decode_node.entry import Entry, Step
from decode_node.outcome import Admitted, Applied, DecodeLoad
from decode_node.rows import Rows
from decode_node.stages import COMPUTE, SEQUENCE_LIFE, SequenceEvent, Stage
from decode_node.step import Part, StepPlan

AGE_LIMIT = 16
RETRY_AFTER_S = 1.0


class DecodeScheduler:
    """Sequences of one decode group. State owner: the group leader's loop.

    One step at a time: `plan`, `take_suspended`, run the batch, `apply`. Between plan and apply everything else may be called.
    reserve_output_tokens: blocks are reserved for so many at most. max_step_tokens: prompt tokens computed in one step;
    mixed_step_tokens: in one that also has rows, which all wait for them, if that is not fewer than the rows.
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
        self._max_step_tokens, self._mixed_step_tokens = max_step_tokens, min(mixed_step_tokens, max_step_tokens)
        self._max_model_len = max_model_len
        self._num_arrived = 0
        self._line = WaitingLine[Entry](age_limit)
        self._entries: dict[str, dict[int, Entry]] = {}  # by request and attempt, until ENDED
        self._active: dict[int, Entry] = {}  # by arrival: ADMITTED, PULLING, COMPUTING, RUNNING
        self._computing: dict[int, Entry] = {}  # by arrival, while COMPUTING
        self._rows = Rows[Entry](pool.block_size)  # RUNNING, and those that end with the step under way
        self._step = Step()
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
        sequence = Sequence.make(request, self._pool.block_size)
        entry = Entry(sequence, self._num_arrived, alone, self._num_promised(sequence))
        self._num_arrived += 1
        self._entries.setdefault(request.request_id, {})[request.attempt] = entry
        # The block of the last token is always its own, so somebody who waits may need no more than `size`, but never none.
        own = entry.num_promised - (len(sequence.token_ids) - 1) // self._pool.block_size
        self._line.join(entry.arrival, entry, size=own, num_tokens=entry.num_left)

    def admit(self) -> tuple[Admitted, ...]:
        """As many waiting sequences as fit now, oldest first; one that does not fit holds up no other until it was overtaken often."""
        admitted: list[Admitted] = []
        if not len(self._line) or len(self._active) >= self._max_sequences:
            return ()
        kept = self._rows.num_outgrown()
        if self._line.least_size + kept > self._pool.available():
            return ()  # nobody fits, however much of a prompt is here already: so nobody would be overtaken either

        def start(entry: Entry) -> Answer:
            if len(self._active) >= self._max_sequences:
                return Answer.STEP_FULL
            if not entry.sequence.fits(self._pool, entry.num_promised + kept):
                return Answer.NO_ROOM
            began = entry.sequence.begin(self._pool, entry.num_promised)
            assert began, "it needs less than what fits"
            entry.on(SequenceEvent.ADMIT_ALONE if entry.alone else SequenceEvent.ADMIT)
            self._active[entry.arrival] = entry
            if entry.alone:
                self._computing[entry.arrival] = entry
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
        self._goes_on(entry, first_token)
        return first_token

    def plan(self, blocked: AbstractSet[Key] = frozenset()) -> Batch:
        """One token for every running sequence but the `blocked` ones (no credits), then chunks of prompts; empty if there is neither.

        May suspend sequences: the caller asks `take_suspended` next.
        """
        assert not self._step.picked.count and not self._step.chunks, "the step before was not applied"
        self._rows.settle()
        left_out = [self._entry(key) for key in blocked if self.stage(key) is Stage.RUNNING]
        new_blocks: list[tuple[int, int]] = []
        for entry in sorted(self._rows.without_slot(), key=attrgetter("arrival")):
            if entry.stage is Stage.RUNNING and entry.key not in blocked and not self._took_block(entry, new_blocks):
                left_out.append(entry)
        self._rows.settle()
        picked = self._rows.pick(left_out)
        self._step = Step(picked)
        batch = self._rows.batch(picked, new_blocks)
        return batch.followed_by(self._chunks(blocked)) if self._computing else batch

    def _chunks(self, blocked: AbstractSet[Key]) -> Batch:
        """Parts of the prompts that are computed here, to go after the rows."""
        computing = [entry for _, entry in sorted(self._computing.items()) if entry.key not in blocked]
        shares = Shares.of(self._chunk_tokens(self._step.picked.count), computing)
        shares.serve(math.inf)
        plan = StepPlan(num_sampled=self._step.picked.count)
        for entry, count in shares.given:
            self._step.chunks.append((entry, plan.add(self._pool, entry.sequence, count)))
            entry.in_chunks = True
        return plan.batch()

    def _chunk_tokens(self, num_rows: int) -> int:
        """How many tokens of prompts a step may have: beside rows about as many, so that it takes at most about twice their time."""
        return min(max(self._mixed_step_tokens, num_rows), self._max_step_tokens) if num_rows else self._max_step_tokens

    def take_suspended(self) -> tuple[Key, ...]:
        """Sequences suspended since the last call: their blocks are given up, and the router must be told to send them again.

        One that was only ADMITTED may have a pull open, with nothing bound and nothing read: close it without release.
        """
        suspended, self._suspended = tuple(self._suspended), []
        return suspended

    def apply(self, sampled: Sampled) -> Applied:
        """The planned step is done: one token of every sequence that is still wanted and whose prompt is computed.

        Those whose logits were no numbers are `take_failed`.
        """
        step, self._step = self._step, Step()
        picked, token_ids = step.picked, sampled.token_ids[: step.picked.count]
        entries = self._rows.items(picked)
        moved = self._rows.move(picked, token_ids, sampled.failed_rows)
        drawn = self._rows.drawn(picked, moved, token_ids)
        for entry in sorted((entries[place] for place in moved.filled), key=attrgetter("arrival")):
            entry.sequence.num_computed = len(entry.sequence.token_ids)
            entry.sequence.enter_tree(self._pool)
        for entry, plain, token_id in zip(entries, moved.plain.tolist(), token_ids.tolist(), strict=True):
            if plain:
                entry.sequence.token_ids.append(token_id)
        others = sorted(np.flatnonzero(~moved.plain).tolist(), key=lambda place: entries[place].arrival)
        events = [self._took(entries[place], sampled, place) for place in others]
        events += [self._computed(entry, part, sampled) for entry, part in step.chunks]
        return Applied(drawn, tuple(event for event in events if event))

    def _computed(self, entry: Entry, part: Part, sampled: Sampled) -> TokenEvent | None:
        """A part of a prompt."""
        entry.in_chunks = False
        entry.sequence.num_computed = part.end
        if part.sampled_row not in sampled.failed_rows:
            entry.sequence.enter_tree(self._pool)
        return self._took(entry, sampled, part.sampled_row)

    def _took(self, entry: Entry, sampled: Sampled, row: int | None) -> TokenEvent | None:
        """What a step did to a sequence that ends, or of whose token there is something to be said; row: where that is, if it is."""
        failed = row in sampled.failed_rows
        if failed:
            entry.sequence.distrust(self._pool)
        if entry.stage is Stage.ENDING:
            self._end(entry, SequenceEvent.STEP_DONE)
        elif failed:
            self._failed.append(entry.key)
            self._end(entry, SequenceEvent.FAIL)
        elif row is not None:
            return self._drawn(entry, sampled, row)
        return None

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
        if entry.in_chunks or self._step.picked.holds(entry.row):
            self._rows.unwanted(entry)
            del self._active[entry.arrival]
            self._computing.pop(entry.arrival, None)
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
        """How busy this group is. O(prompts that are computed here)."""
        running, computing = self._rows.num_wanted, len(self._computing)
        return DecodeLoad(
            waiting=len(self._line),
            pulling=len(self._active) - running - computing,
            computing=computing,
            running=running,
            waiting_tokens=self._line.num_tokens + sum(entry.num_left for entry in self._computing.values()),
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

    def _entry(self, key: Key) -> Entry:
        return self._entries[key[0]][key[1]]

    def _num_promised(self, sequence: Sequence) -> int:
        left = sequence.request.sampling.max_tokens - len(sequence.request.emitted_ids)
        return blocks_for(len(sequence.token_ids) + min(left, self._reserve_output_tokens), self._pool.block_size)

    def _num_prompt_blocks(self, sequence: Sequence) -> int:
        return blocks_for(len(sequence.token_ids), self._pool.block_size)

    def _drawn(self, entry: Entry, sampled: Sampled, row: int) -> TokenEvent:
        """The token after the last one; after a prompt that was computed here, with how much of it was cached."""
        sequence = entry.sequence
        cached = sequence.num_matched * self._pool.block_size if entry.stage is Stage.COMPUTING else None
        event = sequence.event(sampled, row, cached)
        entry.on(SequenceEvent.TOKEN)
        self._computing.pop(entry.arrival, None)
        self._goes_on(entry, event)
        return event

    def _goes_on(self, entry: Entry, event: TokenEvent) -> None:
        """A RUNNING sequence has its next token: the last one, or one more of its row, which it may not have yet."""
        entry.sequence.token_ids += event.token_ids
        if event.finish_reason:
            self._end(entry, SequenceEvent.FINISH)
        elif entry.row is None:
            self._rows.join(entry)

    def _took_block(self, entry: Entry, new_blocks: list[tuple[int, int]]) -> bool:
        """One more block, suspending others if it must; False if the entry itself was suspended or sits out.

        Those that are suspended are younger: they have taken none in this step.
        """
        while not entry.sequence.reserved and not self._pool.available():
            victim = self._victim()
            if victim is None:
                return False
            self._suspended.append(victim.key)
            self._end(victim, SequenceEvent.SUSPEND)
            if victim is entry:
                return False
        new_blocks += entry.sequence.extend(self._pool, 1)
        self._rows.extend(entry)
        return True

    def _victim(self) -> Entry | None:
        """The youngest whose reservation is not firm yet, else the youngest that computes, unless it is the only one."""
        by_age = [entry for _, entry in sorted(self._active.items())]
        promised = [entry for entry in by_age if entry.stage is Stage.ADMITTED]
        compute = [entry for entry in by_age if entry.stage in COMPUTE]
        if promised:
            return promised[-1]
        return compute[-1] if len(compute) > 1 else None

    def _quarantine(self, entry: Entry) -> None:
        sequence = entry.sequence
        entry.foreign = tuple(sequence.block_ids[sequence.num_matched :])
        del sequence.block_ids[sequence.num_matched :]
        self._pool.quarantine(entry.foreign)
        sequence.drop(self._pool)
        del self._active[entry.arrival]
        entry.on(SequenceEvent.GIVE_UP_IN_READ)

    def _end(self, entry: Entry, event: SequenceEvent) -> None:
        """The sequence is over: give up its blocks."""
        if entry.stage is Stage.WAITING:
            self._line.leave(entry.arrival)
        self._active.pop(entry.arrival, None)
        self._computing.pop(entry.arrival, None)
        if entry.row is not None:
            self._rows.leave(entry)
        entry.on(event)
        assert SEQUENCE_LIFE.ends(entry.stage)
        entry.sequence.drop(self._pool)
        request_id, attempt = entry.key
        del self._entries[request_id][attempt]
        if not self._entries[request_id]:
            del self._entries[request_id]
