"""One rank's model: its parameters, its KV cache, and one forward. Knows no schedule and no lock step; see runner.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from baton.engine import weights
from baton.engine.batch import Batch, Sampled
from baton.engine.devices import Device, open_device
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.models import build_model
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.rotary import Rotary
from baton.engine.sampler import Picks, sample
from baton.engine.setting import Setting, Step, Wanted
from baton.engine.spec import ModelSpec


def set_threads(num_threads: int, device: str = "cpu") -> None:
    """How many host threads the engine's operations in this process may use."""
    open_device(device).set_num_threads(num_threads)


class Rank:
    """The part of a model that one rank holds. All ranks of a domain make the same calls, from their step threads.

    Making one allocates the parameters and raises ConfigError if the model cannot be split as `placement` asks; `load` fills them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        groups: Groups,
        model_dir: Path | str,
        kv: KVCache,
        device: str | Device = "cpu",
        between_layers: Callable[[], None] = lambda: None,
    ) -> None:
        """between_layers: called before each layer of a forward, on the thread that computes; what it costs, every layer costs."""
        assert kv.shape == KVShape.of(spec, placement, kv.shape.block_size), kv.shape
        self.spec = spec
        self.placement = placement
        self.kv = kv
        self._device = open_device(device) if isinstance(device, str) else device
        self._model_dir = model_dir
        self._between_layers = between_layers
        setting = Setting(spec, placement, groups, self._device)
        self._rotary = Rotary(setting)
        self._model = build_model(setting)

    def load(self, progress: weights.Progress | None = None) -> int:
        """Read this rank's slices of the checkpoint; returns their bytes. progress(done_bytes, total_bytes). Raises ConfigError."""
        num_bytes = weights.load(self._model_dir, self._model.pieces(), self._model.spare(), progress)
        self._model.prepare()
        return num_bytes

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Sampled:
        """Compute a batch, possibly empty, and sample its rows on the leader of the group; other ranks return no rows.

        All ranks of a group must pass the same batch, all ranks of a coupled domain must call at the same step. Raises NodeLost.
        """
        logits = self._logits(batch)
        return nothing_sampled() if logits is None else sample(logits, batch, Picks(self._device.argmax, self._device.draw))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor | None:
        """Compute a batch; [N, vocab] float32 for its `sample_rows`, None if there are none and on ranks that do not lead.

        For measuring and tests, which may name other rows than Batch.build does, for instance all of a chunk. Otherwise as `forward`.
        """
        logits = self._logits(batch)
        return None if logits is None else logits.float()

    def _logits(self, batch: Batch) -> torch.Tensor | None:
        """The same in the model's dtype."""
        hidden = self._model(self._step(batch))
        return self._model.logits(hidden) if len(batch.sample_rows) else None

    def _step(self, batch: Batch) -> Step:
        cos, sin = self._rotary(self._device.tensor(batch.positions), int(batch.positions.max(initial=0)))
        attention = self._device.block_attention(batch, self.kv.layers[0])
        return Step(self._device.tensor(batch.token_ids), cos, sin, attention, self.kv.layers, self._wanted(batch), self._between_layers)

    def _wanted(self, batch: Batch) -> Wanted | None:
        """The sampled rows, and the last one where none is: whoever leads knows that all ranks have written their keys and values, also
        the last layer's, because it has added up with them what came next. Then others may read them.
        """
        if batch.samples_all:
            return None
        rows = batch.sample_rows if len(batch.sample_rows) else np.array([batch.num_tokens - 1], np.int32)
        return Wanted(self._device.tensor(rows), self._device.block_attention(batch.only(rows), self.kv.layers[0]))


def nothing_sampled() -> Sampled:
    """A Sampled without rows."""
    return Sampled(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32))
