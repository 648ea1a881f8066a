"""Where a model itself cannot tell which token comes next. Knows the engine; no network.

In float32 the sums of a step depend in their last bits on what it is batched with, in undisturbed runs as well: logits differ by some 1e-6.
A draw whose number falls that near to the border of two tokens, or two greedy logits that near to each other, may then go either way.
A run under faults compares a hundred thousand tokens, and meets one or two of these. So such a difference is looked at: if noise as small
as that, put on the logits of this place, gives both tokens, it means nothing; any other difference is a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.sampler import sample
from bench.chaos.judge import Doubt
from bench.solo import BLOCK_SIZE, Solo

NOISE = 1e-5
_NUM_DRAWS = 1024


def undecided(model_dir: Path, doubts: Sequence[Doubt]) -> frozenset[Doubt]:
    """Those of the doubts in which both tokens are right. Loads the model in float32, on this process's threads."""
    longest = max(len(doubt.ask.prompt_ids) + len(doubt.before) for doubt in doubts)
    solo = Solo(model_dir, "float32", "none", 1, longest)
    return frozenset(doubt for doubt in doubts if {doubt.expected, doubt.found} <= drawn(_logits(solo, doubt), _sampling(doubt)))


def drawn(logits: torch.Tensor, sampling: SampleRow) -> set[int]:
    """What is sampled from logits [vocab] when they are known to within NOISE only."""
    noise = torch.randn(_NUM_DRAWS, len(logits), generator=torch.Generator().manual_seed(0)) * NOISE
    return set(sample(logits + noise, Batch.build([Row([0], 0, [0], sampling)] * _NUM_DRAWS)).token_ids.tolist())


def _logits(solo: Solo, doubt: Doubt) -> torch.Tensor:
    ids = [*doubt.ask.prompt_ids, *doubt.before]
    blocks = range(-(-len(ids) // BLOCK_SIZE))
    logits = solo.rank.logits(Batch.build([Row(ids, 0, blocks, _sampling(doubt))]))
    assert logits is not None, "a rank alone leads"
    return logits[0]


def _sampling(doubt: Doubt) -> SampleRow:
    ask = doubt.ask
    return SampleRow(ask.seed, len(doubt.before), ask.temperature, ask.top_k, ask.top_p, 0.0)
