"""A prefill step while it is planned: rows for the batch, and what each means for its prompt. Pure; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from baton.engine.batch import Batch, Row
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Sequence


class Computed(Protocol):
    """A prompt as far as a step goes."""

    @property
    def sequence(self) -> Sequence:
        """Its tokens and blocks."""


Prompt = TypeVar("Prompt", bound=Computed)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Prompt]):
    """A prompt's part of a step: computed up to token `end` after it. sampled_row: of the token after the prompt, in its last chunk."""

    prompt: Prompt
    end: int
    sampled_row: int | None


@dataclass(slots=True)
class Step(Generic[Prompt]):
    """Made for one step and gone with it."""

    chunks: list[Chunk[Prompt]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    new_blocks: list[tuple[int, int]] = field(default_factory=list)
    num_sampled: int = 0

    def add(self, prompt: Prompt, count: int, pool: BlockPool) -> None:
        """Compute `count` more tokens of a prompt, in blocks that it takes now."""
        sequence = prompt.sequence
        start, end = sequence.num_computed, sequence.num_computed + count
        last = end == len(sequence.token_ids)
        self.new_blocks += sequence.extend(pool, blocks_for(end, pool.block_size) - len(sequence.block_ids))
        self.rows.append(Row(sequence.token_ids[start:end], start, tuple(sequence.block_ids), sequence.sample_row() if last else None))
        self.chunks.append(Chunk(prompt, end, self.num_sampled if last else None))
        self.num_sampled += last

    def batch(self) -> Batch:
        """What the ranks run."""
        return Batch.build(self.rows, self.new_blocks)
