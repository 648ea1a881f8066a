"""What is measured and what it must show, as data. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for Baton's median over the peer's. key: a figure by the name of `vllm bench serve`."""

    key: str
    limit: float
    at_least: bool = False

    def met(self, ratio: float) -> bool:
        """Whether a ratio is on the right side."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def said(self) -> str:
        """≥ 1.4, say."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One load. concurrency: most requests at a time, all of which have arrived at the start."""

    name: str
    model: str
    input_len: int
    output_len: int
    concurrency: int
    num_prompts: int
    goals: Sequence[Goal]

    @property
    def said(self) -> str:
        """For people."""
        return f"{self.model}, {self.input_len}/{self.output_len}, concurrency {self.concurrency}"


def _throughput(limit: float) -> Goal:
    return Goal("output_throughput", limit, at_least=True)


ROWS: Sequence[Row] = (
    Row("50-50-128", "qwen3-60m", 50, 50, 128, 256, (_throughput(1.4), Goal("mean_ttft_ms", 0.6), Goal("p99_itl_ms", 0.5))),
    Row("512-128-16", "qwen3-60m", 512, 128, 16, 64, (_throughput(1.4), Goal("mean_ttft_ms", 0.8), Goal("p99_itl_ms", 0.3))),
    Row("50-50-1", "qwen3-60m", 50, 50, 1, 16, (Goal("mean_tpot_ms", 0.8), Goal("mean_ttft_ms", 1.0), Goal("p99_itl_ms", 1.0))),
    Row("moe-128-128-32", "qwen3moe-200m", 128, 128, 32, 128, (_throughput(1.2), Goal("mean_ttft_ms", 0.8), Goal("p99_itl_ms", 0.8))),
)
START_GOAL = Goal("ready_s", 0.25)
GENERATE_GOAL = Goal("output_throughput", 3.0, at_least=True)
DISTURBED_LIMIT = 1.3
GEMM_SHARE = 0.6
# Not in ROWS, since they are no load on two servers: batches of transformers, streams that prompts disturb, the bound of the FLOPs.
EXPERIMENTS = ("transformers", "disaggregation", "bound")
# Of a Baton cluster, whose CPU seconds are told apart.
PARTS = ("prefill", "decode", "router", "rest")
FIGURES = (
    "output_throughput",
    "request_throughput",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
)


def medians(rounds: Sequence[Figures]) -> dict[str, float]:
    """Each figure's median over rounds that have it."""
    keys = {key for figures in rounds for key in figures}
    return {key: median(figures[key] for figures in rounds if key in figures) for key in sorted(keys)}


def ratio(ours: Figures, theirs: Figures, key: str) -> float | None:
    """Ours over theirs; None where one has no such figure, or theirs is zero."""
    return ours[key] / theirs[key] if key in ours and theirs.get(key) else None
