"""The load generator, as a command that writes one JSON file: the peer's own, or ours. Both have the same options and names."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.errors import InternalError
from bench.suite.program import output_of
from bench.suite.rows import FIGURES, Row

_LOAD_S = 900.0
_SHOWN_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Ruler:
    """words: the command. name: as it is written into results."""

    name: str
    words: Sequence[str]

    @classmethod
    def of_peer(cls, peer: Path) -> Ruler:
        """Neither side brings its own ruler if it is this one for both."""
        return cls("vllm bench serve", (str(peer / "bin" / "vllm"), "bench", "serve"))

    @classmethod
    def ours(cls) -> Ruler:
        """Cheaper per token."""
        return cls("baton bench serve", (sys.executable, "-m", "baton", "bench", "serve"))

    def measured(self, row: Row, model: Path, url: str, num_prompts: int, seed: int) -> dict[str, float]:
        """Put a row's load on a server. Raises InternalError unless every request succeeds: there is nothing to compare then."""
        with tempfile.TemporaryDirectory() as folder:
            printed = output_of(self.name, [*self.words, *_options(row, model, url, num_prompts, seed, folder)], _LOAD_S)
            found = json.loads(Path(folder, "r.json").read_text(encoding="utf-8"))
        if found["completed"] != num_prompts:
            raise InternalError(f"{row.name}: only {found['completed']} of {num_prompts} requests succeeded: {printed[-_SHOWN_CHARS:]}")
        return {key: float(found[key]) for key in FIGURES}


def _options(row: Row, model: Path, url: str, num_prompts: int, seed: int, folder: str) -> list[str]:
    return [
        *("--backend", "openai", "--base-url", url, "--model", str(model)),
        *("--dataset-name", "random", "--random-input-len", str(row.input_len), "--random-output-len", str(row.output_len)),
        *("--num-prompts", str(num_prompts), "--max-concurrency", str(row.concurrency), "--seed", str(seed), "--ignore-eos"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99", "--disable-tqdm"),
        *("--save-result", "--result-dir", folder, "--result-filename", "r.json"),
    ]
