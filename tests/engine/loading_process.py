"""A process that loads one rank's share of checkpoints and says how much memory that took. Run by test_weights.py.

Prints a line of JSON for each: shard_bytes, and peak_bytes, by how much anonymous memory (RssAnon in /proc/self/status: what is
written, and not the pages of mapped files, which the kernel may drop at any time) grew at its peak. A thread samples it as fast as
the kernel answers; torch lets it run while it copies. MALLOC_MMAP_THRESHOLD_ must be set, so that freed tensors are given back.
"""

import json
import re
import sys
import threading
from pathlib import Path
from typing import Self

import torch

from baton.engine import weights
from baton.engine.config_json import load_spec
from baton.engine.devices import open_device
from baton.engine.models import build_model
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.setting import Setting

_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


def anonymous_bytes() -> int:
    """Of this process, resident."""
    found = _ANONYMOUS.search(Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """By how much anonymous_bytes grew while a block ran, at most."""

    def __init__(self) -> None:
        self.bytes, self._start, self._done = 0, anonymous_bytes(), threading.Event()
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()

    def _sample(self) -> None:
        done = False
        while not done:
            done = self._done.wait(0.0005)
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)


def load(model_dir: str, quantization: str) -> dict[str, int]:
    """Load what tp rank 0 of 4 holds."""
    spec = load_spec(model_dir, "bfloat16", quantization)
    weights.load(model_dir, [], spare=["model.", "lm_head."])  # what opening files costs
    model = build_model(Setting(spec, Placement.of(0, 4), Groups.alone(), open_device("cpu")))
    with Peak() as peak:
        shard_bytes = weights.load(model_dir, model.pieces(), model.spare())
    return {"shard_bytes": shard_bytes, "peak_bytes": peak.bytes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in sys.argv[1:]:
        print(json.dumps(load(*one.split("="))))
