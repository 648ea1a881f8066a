"""Which sequences a decode group takes in, generates next and suspends. Pure: plain values in, plans out.

    WAITING ──admit──▶ ADMITTED ──bind──▶ PULLING ──start──▶ RUNNING ──last token──▶ ENDED
                          │                  │ cancel           │ cancel during a step
                          └─▶ ENDED          ▼                  ▼
                                        QUARANTINED          ENDING ──apply──▶ ENDED
                                             └──quiesced──▶ ENDED

An admitted sequence holds its cached prefix and a promise of blocks by count; blocks are bound as its pull needs them.
A sequence that outgrows its promise takes from the pool; when that is full, one is suspended: first the youngest that is
only ADMITTED, else the youngest RUNNING. The router sends it again, as a new attempt. Knows no clock and no leases.
"""

from __future__ import annotations

import enum
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from baton.engine.batch import Batch, Row, Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Answer, Key, Sequence, WaitingLine, check_sequence
from baton.errors import InternalError, InvalidRequest, ResourceExhausted
from baton.request import SequenceRequest, TokenEvent

AGE_LIMIT = 16
RETRY_AFTER_S = 1.0


class Stage(enum.Enum):
    """Where a sequence is in its life; see the drawing above."""

    WAITING = "waiting"
    ADMITTED = "admitted"
    PULLING = "pulling"
    RUNNING = "running"
    ENDING = "ending"
    QUARANTINED = "quarantined"
    ENDED = "ended"


_NEXT = {
    Stage.WAITING: {Stage.ADMITTED, Stage.ENDED},
    Stage.ADMITTED: {Stage.PULLING, Stage.ENDED},
    Stage.PULLING: {Stage.RUNNING, Stage.QUARANTINED, Stage.ENDED},
    Stage.RUNNING: {Stage.ENDING, Stage.ENDED},
    Stage.ENDING: {Stage.ENDED},
    Stage.QUARANTINED: {Stage.ENDED},
    Stage.ENDED: set[Stage](),
}


@dataclass(frozen=True, slots=True)
class Admitted:
    """Room is reserved for this attempt; its first matched_blocks blocks are here already and need not be pulled."""

    request_id: str
    attempt: int
    matched_blocks: int


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Sequences waiting for blocks, admitted or pulling, and running; prompt tokens of those waiting."""

    waiting: int
    pulling: int
    running: int
    waiting_tokens: int


@dataclass(slots=True, eq=False)
class _Entry:
    """in_step: the planned step writes its blocks. foreign: blocks that late remote writes may still reach."""

    sequence: Sequence
    arrival: int
    stage: Stage = Stage.WAITING
    in_step: bool = False
    foreign: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        return self.sequence.request.key

    def to(self, stage: Stage) -> None:
        assert stage in _NEXT[self.stage], f"a sequence does not go from {self.stage} to {stage}"
        self.stage = stage


class DecodeScheduler:
    """Sequences of one decode group. State owner: the group leader's loop.

    One step at a time: `plan`, `take_suspended`, run the batch, `apply`. Between plan and apply everything else may be called.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_waiting: int,
        reserve_output_tokens: int,
        max_model_len: int,
        age_limit: int = AGE_LIMIT,
    ) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._reserve_output_tokens = reserve_output_tokens
        self._max_model_len = max_model_len
        self._num_arrived = 0
        self._line = WaitingLine[_Entry](age_limit)
        self._entries: dict[str, dict[int, _Entry]] = {}  # by request and attempt, until ENDED
        self._active: dict[int, _Entry] = {}  # by arrival: ADMITTED, PULLING, RUNNING
        self._planned: list[_Entry] = []  # rows of the step between plan and apply
        self._suspended: list[Key] = []  # until take_suspended
        self._failed: list[Key] = []  # until take_failed

    def add(self, request: SequenceRequest) -> None:
        """A sequence to generate. Raises ResourceExhausted if too many wait, InvalidRequest if it can never run here or is here."""
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
        entry = _Entry(Sequence.make(request, self._pool.block_size), self._num_arrived)
        self._num_arrived += 1
        self._entries.setdefault(request.request_id, {})[request.attempt] = entry
        self._line.join(entry.arrival, entry)

    def admit(self) -> tuple[Admitted, ...]:
        """As many waiting sequences as fit now, oldest first; one that does not fit holds up no other until it was overtaken often."""
        admitted: list[Admitted] = []

        def start(entry: _Entry) -> Answer:
            if len(self._active) >= self._max_sequences:
                return Answer.STEP_FULL
            if not entry.sequence.begin(self._pool, self._num_promised(entry.sequence)):
                return Answer.NO_ROOM
            entry.to(Stage.ADMITTED)
            self._active[entry.arrival] = entry
            admitted.append(Admitted(*entry.key, entry.sequence.num_matched))
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
        if entry.stage is Stage.ADMITTED:
            entry.to(Stage.PULLING)
        assert entry.stage is Stage.PULLING
        assert 0 <= count <= self._num_prompt_blocks(entry.sequence) - len(entry.sequence.block_ids)
        return entry.sequence.extend(self._pool, count)

    def start(self, key: Key, first_token: TokenEvent) -> TokenEvent:
        """All prompt blocks are pulled and verified on every rank: the sequence joins the batch with the token prefill drew.

        Returns the event that repeats this token; if it finishes the request, the sequence is over.
        Raises InternalError, and changes nothing, if the token is not the one after prompt and emitted tokens.
        """
        entry = self._entry(key)
        sequence = entry.sequence
        expected = len(sequence.request.emitted_ids)
        if first_token.output_index != expected:
            raise InternalError(f"request {key[0]}: prefill drew output token {first_token.output_index}, not {expected}", stage="pull")
        assert len(sequence.block_ids) == self._num_prompt_blocks(sequence), "not all prompt blocks are bound"
        entry.to(Stage.RUNNING)
        sequence.num_computed = len(sequence.token_ids)
        sequence.enter_tree(self._pool)
        sequence.token_ids += first_token.token_ids
        if first_token.finish_reason:
            self._end(entry)
        return TokenEvent(*key, expected, first_token.token_ids, first_token.logprobs, first_token.finish_reason)

    def plan(self, blocked: AbstractSet[Key] = frozenset()) -> Batch:
        """One token for every running sequence but the `blocked` ones (no credits); empty if there is none.

        May suspend sequences: the caller asks `take_suspended` next.
        """
        assert not self._planned, "the step before was not applied"
        new_blocks: list[tuple[int, int]] = []
        for entry in self._runnable(blocked):
            # Victims are younger or the entry itself: what was planned so far stays.
            if entry.stage is Stage.RUNNING and self._grow(entry, new_blocks):
                entry.in_step = True
                self._planned.append(entry)
        return Batch.build([_row(entry.sequence) for entry in self._planned], new_blocks)

    def take_suspended(self) -> tuple[Key, ...]:
        """Sequences suspended since the last call: their blocks are given up, and the router must be told to send them again.

        One that was only ADMITTED may have a pull open, with nothing bound and nothing read: close it without release.
        """
        suspended, self._suspended = tuple(self._suspended), []
        return suspended

    def apply(self, sampled: Sampled) -> tuple[TokenEvent, ...]:
        """The planned step is done: one event per sequence that is still wanted. Those whose logits were no numbers are `take_failed`."""
        planned, self._planned = self._planned, []
        events: list[TokenEvent] = []
        for row, entry in enumerate(planned):
            entry.in_step = False
            entry.sequence.num_computed += 1
            if row in sampled.failed_rows:  # what it wrote must not reach others through the tree
                self._fail(entry)
                continue
            entry.sequence.enter_tree(self._pool)
            if entry.stage is Stage.RUNNING:
                event = entry.sequence.event(sampled, row)
                entry.sequence.token_ids += event.token_ids
                events.append(event)
            if entry.stage is Stage.ENDING or events[-1].finish_reason:
                self._end(entry)
        return tuple(events)

    def take_failed(self) -> tuple[Key, ...]:
        """Sequences that ended since the last call because no token could be drawn: the router must be told."""
        failed, self._failed = tuple(self._failed), []
        return failed

    def _fail(self, entry: _Entry) -> None:
        if entry.stage is Stage.RUNNING:
            self._failed.append(entry.key)
        self._end(entry)

    def cancel(self, request_id: str, attempt: int, *, quarantine: bool) -> bool:
        """This attempt and all before it are over; whether there were any.

        quarantine: bound blocks of those that are PULLING may still be written; they wait for `quiesced`.
        Blocks that the planned step writes are given up by apply.
        """
        attempts = self._entries.get(request_id, {})
        over = [entry for number, entry in sorted(attempts.items()) if number <= attempt and entry.stage is not Stage.QUARANTINED]
        for entry in over:
            if quarantine and entry.stage is Stage.PULLING:
                self._quarantine(entry)
            else:
                self._end(entry)
        return bool(over)

    def quiesced(self, key: Key) -> None:
        """No write can land in the quarantined blocks of this sequence any more. Ignored if it has none."""
        if self.stage(key) is Stage.QUARANTINED:
            entry = self._entry(key)
            self._pool.unquarantine(entry.foreign)
            self._end(entry)

    def load(self) -> DecodeLoad:
        """How busy this group is. O(sequences)."""
        running = sum(entry.stage is Stage.RUNNING for entry in self._active.values())
        return DecodeLoad(
            waiting=len(self._line),
            pulling=len(self._active) - running,
            running=running,
            waiting_tokens=sum(len(entry.sequence.token_ids) for entry in self._line.items()),
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

    def _num_prompt_blocks(self, sequence: Sequence) -> int:
        return blocks_for(len(sequence.token_ids), self._pool.block_size)

    def _runnable(self, blocked: AbstractSet[Key]) -> list[_Entry]:
        return [entry for _, entry in sorted(self._active.items()) if entry.stage is Stage.RUNNING and entry.key not in blocked]

    def _grow(self, entry: _Entry, new_blocks: list[tuple[int, int]]) -> bool:
        """Make sure the next token has a slot, suspending others if it must; False if the entry itself was suspended."""
        sequence = entry.sequence
        if len(sequence.block_ids) * self._pool.block_size >= len(sequence.token_ids):
            return True
        while not sequence.reserved and not self._pool.available():
            victim = self._victim()
            self._suspended.append(victim.key)
            self._end(victim)
            if victim is entry:
                return False
        new_blocks += sequence.extend(self._pool, 1)
        return True

    def _victim(self) -> _Entry:
        """The youngest sequence whose reservation is not firm yet, else the youngest running one."""
        ranked = sorted(self._active.values(), key=lambda entry: (entry.stage is Stage.ADMITTED, entry.arrival))
        return next(entry for entry in reversed(ranked) if entry.stage in (Stage.ADMITTED, Stage.RUNNING))

    def _quarantine(self, entry: _Entry) -> None:
        sequence = entry.sequence
        entry.foreign = tuple(sequence.block_ids[sequence.num_matched :])
        del sequence.block_ids[sequence.num_matched :]
        self._pool.quarantine(entry.foreign)
        sequence.drop(self._pool)
        del self._active[entry.arrival]
        entry.to(Stage.QUARANTINED)

    def _end(self, entry: _Entry) -> None:
        """The sequence is over: give up its blocks now, or after the step that writes them."""
        if entry.stage is Stage.WAITING:
            self._line.leave(entry.arrival)
        self._active.pop(entry.arrival, None)
        if entry.in_step:
            if entry.stage is Stage.RUNNING:
                entry.to(Stage.ENDING)
            return
        entry.to(Stage.ENDED)
        entry.sequence.drop(self._pool)
        self._forget(entry.sequence.request)

    def _forget(self, request: SequenceRequest) -> None:
        attempts = self._entries[request.request_id]
        del attempts[request.attempt]
        if not attempts:
            del self._entries[request.request_id]


def _row(sequence: Sequence) -> Row:
    return Row(sequence.token_ids[-1:], sequence.num_computed, sequence.block_ids, sequence.sample_row())
