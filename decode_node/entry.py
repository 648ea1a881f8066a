"""A sequence of a decode group as its scheduler keeps it, and the step that is under way. Plain state; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.engine.sequence import Key, Sequence
from decode_node.rows import NOBODY, Picked
from decode_node.stages import SEQUENCE_LIFE, SequenceEvent, Stage
from decode_node.step import Part


@dataclass(slots=True, eq=False)
class Entry:
    """alone: without a lease. num_promised: blocks that are promised when it is let in. row: among the running ones, while it runs.

    in_chunks: the planned step writes its blocks with a part of its prompt. foreign: blocks that late remote writes may still reach.
    """

    sequence: Sequence
    arrival: int
    alone: bool
    num_promised: int
    stage: Stage = SEQUENCE_LIFE.start
    row: int | None = None
    in_chunks: bool = False
    foreign: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        """What messages about it are keyed by."""
        return self.sequence.request.key

    @property
    def num_left(self) -> int:
        """Tokens whose KV is not here yet."""
        return len(self.sequence.token_ids) - self.sequence.num_computed

    def on(self, event: SequenceEvent) -> None:
        """The only way to change the stage."""
        self.stage = SEQUENCE_LIFE.after(self.stage, event)


@dataclass(slots=True)
class Step:
    """The step between plan and apply: rows of those that run, and parts of prompts."""

    picked: Picked = NOBODY
    chunks: list[tuple[Entry, Part]] = field(default_factory=list)
