"""One step of a domain: pass the leader's batch on, agree whether anybody has work, compute. Knows no scheduler and no clock."""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.batch import Batch, Row, Sampled, SampleRow
from baton.engine.parallel import Groups
from baton.engine.rank import Rank, nothing_sampled


@dataclass(frozen=True, slots=True, eq=False)
class StepOutcome:
    """What one step came to.

    epoch: the number of this step, from 1, equal on all ranks of the domain. asleep: no rank of the domain had any work; all know
    it from the same exchange, so all may wait for a local condition (never in a collective) and join epoch + 1 when woken.
    num_tokens: computed for this rank's group. sampled: rows only on the group's leader.
    """

    epoch: int
    asleep: bool
    num_tokens: int
    sampled: Sampled


class Runner:
    """Steps a rank in lock step with its domain. Blocking; called from one thread, the step thread of its process.

    Every rank of the domain calls `step` the same number of times: a rank that stays away makes the others raise NodeLost when
    the groups' timeout has passed, after which the groups are of no use.
    """

    def __init__(self, rank: Rank, groups: Groups) -> None:
        self._rank, self._groups, self._placement = rank, groups, rank.placement
        self.epoch = 0

    def step(self, batch: Batch | None) -> StepOutcome:
        """Run one step. The leader of a tensor-parallel group passes its batch, empty if it has no work; followers pass None."""
        assert (batch is not None) == self._placement.leader, "the leader brings the batch, nobody else"
        self.epoch += 1
        return self._run(self._agreed(batch))

    def _run(self, batch: Batch) -> StepOutcome:
        if not self._anyone_works(batch):
            return StepOutcome(self.epoch, True, 0, nothing_sampled())
        self._rank.kv.stamp(batch)
        return StepOutcome(self.epoch, False, batch.num_tokens, self._rank.forward(batch))

    def warm_up(self, max_tokens: int = 64) -> None:
        """Two steps, a prompt of up to max_tokens and one token after it with a draw, in blocks that nobody owns yet: before serving only.

        All ranks of the domain must call it. Blocks hold rubbish afterwards, which nothing refers to. Epochs do not count it.
        """
        block_size, num_blocks = self._rank.kv.shape.block_size, self._rank.kv.num_blocks
        num_tokens = max(1, min(max_tokens, num_blocks * block_size - 1, self._rank.spec.max_position_embeddings - 1))
        blocks = range(min(num_blocks, num_tokens // block_size + 1))
        for row in (Row([0] * num_tokens, 0, blocks), Row([0], num_tokens, blocks, SampleRow(0, 0, 0.0, 0, 1.0, 0.0))):
            self._run(Batch.build([row]))

    def _agreed(self, batch: Batch | None) -> Batch:
        if self._placement.tp_size == 1:
            assert batch is not None
            return batch
        return Batch.unpack(self._groups.broadcast(None if batch is None else batch.pack()))

    def _anyone_works(self, batch: Batch) -> bool:
        if self._placement.coupled:
            return any(self._groups.exchange_sizes(batch.num_tokens))
        return batch.num_tokens > 0
