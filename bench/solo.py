"""One model in this process, alone on one rank: continues prompts, and scores texts. Knows the engine; no node, no network.

Q: sequences, L: tokens of each, P: positions asked about. Row i of every step has the same blocks, so a new prompt overwrites what
the row before it left there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.config_json import load_spec
from baton.engine.devices import Device
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.rank import Rank
from baton.errors import ConfigError
from bench.agreement import Floats, Ids

BLOCK_SIZE = 16
_AFTER_LAST = SampleRow(0, 0, 0.0, 0, 1.0, 0.0)  # asks for logits; nothing is drawn from them here
Advance = Callable[[int], None]


class Solo:
    """A loaded model with a cache for max_rows sequences of max_len tokens. Raises ConfigError as loading does."""

    def __init__(self, model_dir: Path, dtype: str, quantization: str, max_rows: int, max_len: int, device: str | Device = "cpu") -> None:
        self.spec = load_spec(model_dir, dtype, quantization)
        shape = KVShape.of(self.spec, Placement(), BLOCK_SIZE)
        self._blocks_each = -(-max_len // BLOCK_SIZE)
        num_blocks = max_rows * self._blocks_each
        kv = KVCache(shape, num_blocks, bytearray(num_blocks * shape.block_bytes), np.zeros(num_blocks, np.uint64))
        self.rank = Rank(self.spec, Placement(), Groups.alone(), model_dir, kv, device)
        self.rank.load()

    def answers(self, prompts: Ids, num_positions: int, batch: int, advance: Advance, fed: Ids | None = None) -> Ids:
        """The most likely token at each of num_positions positions after the prompts [Q, L] -> [Q, P], decoded step by step.

        What the next step is fed: the token just chosen (free running), or that of fed [Q, P] (teacher forcing). batch: sequences
        per step. advance(n) is told of every n tokens decoded.
        """
        chosen = np.empty((len(prompts), num_positions), np.int64)
        inputs, prompt_len = chosen if fed is None else fed, prompts.shape[1]
        for rows in _runs(len(prompts), batch):
            step = self.step(prompts[rows], 0)
            for position in range(num_positions):
                chosen[rows, position] = self._logits(step).argmax(-1).numpy()
                step = self.step(inputs[rows, position : position + 1], prompt_len + position)
                advance(rows.stop - rows.start)
        return chosen

    def scores(self, windows: Ids, batch: int, advance: Advance) -> tuple[Floats, Ids]:
        """Windows of text [Q, L + 1] -> log probability of every token but the first, and the most likely one there, both [Q, L].

        batch: windows per step. advance(n) is told of every n tokens scored.
        """
        shape = len(windows), windows.shape[1] - 1
        logprobs, chosen = np.empty(shape, np.float32), np.empty(shape, np.int64)
        for rows in _runs(len(windows), batch):
            step = self.step(windows[rows, :-1], 0)
            logits = self._logits(replace(step, sample_rows=np.arange(step.num_tokens, dtype=np.int32)))
            text = torch.from_numpy(windows[rows, 1:].reshape(-1, 1))
            logprobs[rows] = torch.log_softmax(logits, -1).gather(1, text).view(-1, shape[1]).numpy()
            chosen[rows] = logits.argmax(-1).view(-1, shape[1]).numpy()
            advance(step.num_tokens)
        return logprobs, chosen

    def step(self, tokens: Ids, start: int) -> Batch:
        """The step that computes tokens [Q, n] at positions start, start + 1, …, with logits after the last."""
        each = self._blocks_each
        return Batch.build([Row(ids.tolist(), start, range(row * each, (row + 1) * each), _AFTER_LAST) for row, ids in enumerate(tokens)])

    def _logits(self, step: Batch) -> torch.Tensor:
        logits = self.rank.logits(step)
        assert logits is not None, "a rank alone leads"
        if not bool(logits.isfinite().all()):
            raise ConfigError("the model's logits are not finite: there is nothing to compare")
        return logits


def _runs(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
