"""One step of a decode group as it is put together: rows for the batch, and what each of them computes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.engine.batch import Batch, Row
from baton.engine.blocks import BlockPool, blocks_for
from baton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Part:
    """What the step computes of one sequence: its tokens before `end`. sampled_row: where the token after them is drawn, if it is."""

    end: int
    sampled_row: int | None


@dataclass(slots=True)
class StepPlan:
    """Made and ended by `DecodeScheduler.plan`. new_blocks: (block, generation), to be stamped before the step writes."""

    rows: list[Row] = field(default_factory=list)
    new_blocks: list[tuple[int, int]] = field(default_factory=list)
    num_sampled: int = 0

    def add(self, pool: BlockPool, sequence: Sequence, count: int) -> Part:
        """Compute the next `count` tokens of a sequence, for which the pool has the blocks; draw the next one if these are its last."""
        start, end = sequence.num_computed, sequence.num_computed + count
        last = end == len(sequence.token_ids)
        self.new_blocks += sequence.extend(pool, max(0, blocks_for(end, pool.block_size) - len(sequence.block_ids)))
        self.rows.append(Row(sequence.token_ids[start:end], start, sequence.block_ids, sequence.sample_row() if last else None))
        self.num_sampled += last
        return Part(end, self.num_sampled - 1 if last else None)

    def batch(self) -> Batch:
        """The step's arrays."""
        return Batch.build(self.rows, self.new_blocks)
