"""A run as the table every bench_serving prints, and as JSON with its names. Pure: figures in, text out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serve.answers import Answer
from bench.serve.metrics import Metrics, Spread, Times
from bench.serve.names import SERIES

_WIDTH = 50
_SHOWN_ERRORS = 5
_SHOWN_CHARS = 500
# Beyond these the generator, and not the server, shaped what was measured.
_LATE_MS, _BUSY = 10.0, 0.8


@dataclass(frozen=True, slots=True)
class Run:
    """What was asked of the generator and what it cost. rate: requests/s. cpu_s: of this process, while the load ran."""

    rate: float
    max_concurrency: int | None
    cpu_s: float
    interrupted: bool = False


def table(metrics: Metrics, run: Run, series: Sequence[str]) -> str:
    """The "Serving Benchmark Result"."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}", *(_line(*row) for row in _counts(metrics, run))]
    for name in series:
        short, long = SERIES[name]
        lines += [f"{long:-^{_WIDTH}}", *(_line(label, value) for label, value in _spread(short, metrics.spreads[name]))]
    lines += [f"{'Load Generator':-^{_WIDTH}}", *(_line(*row) for row in _generator(metrics, run)), "=" * _WIDTH]
    return "\n".join(lines)


def warnings(metrics: Metrics, run: Run) -> Iterator[str]:
    """What keeps the figures from being the server's alone."""
    if metrics.late.percentiles[99.0] > _LATE_MS:
        yield (
            f"the load generator was late: 1 % of requests left {metrics.late.percentiles[99.0]:.0f} ms or more after they were due. "
            "Latencies count from then, so they include it; lower the rate, or give the generator a core of its own"
        )
    if run.cpu_s > _BUSY * metrics.duration_s:
        yield (
            f"the load generator used {run.cpu_s / metrics.duration_s:.0%} of a core: it may not keep up, and then it is measured "
            "instead of the server"
        )
    if run.interrupted:
        yield f"interrupted: {metrics.aborted} requests had not ended and are not counted"


def errors(answers: Sequence[Answer]) -> Iterator[str]:
    """The first few different failures, with how often each was seen."""
    seen = Counter(answer.error[:_SHOWN_CHARS] for answer in answers if answer.ended and answer.error)
    for error, count in seen.most_common(_SHOWN_ERRORS):
        yield f"{count} x {error}"
    if len(seen) > _SHOWN_ERRORS:
        yield f"and {len(seen) - _SHOWN_ERRORS} other kinds"


def as_json(metrics: Metrics, run: Run, series: Sequence[str]) -> dict[str, Any]:
    """The figures by the names of `vllm bench serve`, and our own: aborted, generator_*."""
    found: dict[str, Any] = {
        "duration": metrics.duration_s,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "aborted": metrics.aborted,
        "total_input_tokens": metrics.total_input_tokens,
        "total_output_tokens": metrics.total_output_tokens,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.request_goodput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_token_throughput,
        "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
        "max_concurrent_requests": metrics.max_concurrent_requests,
        "generator_late_mean_ms": metrics.late.mean_ms,
        "generator_late_p99_ms": metrics.late.percentiles[99.0],
        "generator_late_max_ms": metrics.late.percentiles[100.0],
        "generator_cpu_s": run.cpu_s,
    }
    for name in series:
        found |= _named(name, metrics.spreads[name])
    return found


def detailed(answers: Sequence[Answer]) -> dict[str, Any]:
    """One entry per request, for --save-detailed; of those that failed only the error."""
    times = [Times.of(answer) if answer.succeeded else None for answer in answers]
    return {
        "input_lens": [answer.num_prompt for answer in answers],
        "output_lens": [answer.num_output if answer.succeeded else 0 for answer in answers],
        "start_times": [answer.due_s + answer.late_s for answer in answers],
        "ttfts": [item.ttft_s if item else 0.0 for item in times],
        "itls": [list(item.itl_s) if item else [] for item in times],
        "latencies": [item.e2el_s if item else 0.0 for item in times],
        "queue_times": [item.queue_s if item else 0.0 for item in times],
        "generated_texts": ["".join(answer.texts) for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def _counts(metrics: Metrics, run: Run) -> Iterator[tuple[str, float]]:
    yield "Successful requests:", metrics.completed
    yield "Failed requests:", metrics.failed
    if run.max_concurrency is not None:
        yield "Maximum request concurrency:", run.max_concurrency
    if run.rate != float("inf"):
        yield "Request rate configured (RPS):", run.rate
    yield "Benchmark duration (s):", metrics.duration_s
    yield "Total input tokens:", metrics.total_input_tokens
    yield "Total generated tokens:", metrics.total_output_tokens
    yield "Request throughput (req/s):", metrics.request_throughput
    if metrics.request_goodput is not None:
        yield "Request goodput (req/s):", metrics.request_goodput
    yield "Output token throughput (tok/s):", metrics.output_throughput
    yield "Peak output token throughput (tok/s):", metrics.max_output_tokens_per_s
    yield "Peak concurrent requests:", metrics.max_concurrent_requests
    yield "Total token throughput (tok/s):", metrics.total_token_throughput


def _spread(short: str, spread: Spread) -> Iterator[tuple[str, float]]:
    yield f"Mean {short} (ms):", spread.mean_ms
    yield f"Median {short} (ms):", spread.median_ms
    for percentile, value in spread.percentiles.items():
        yield f"P{percentile:g} {short} (ms):", value


def _generator(metrics: Metrics, run: Run) -> Iterator[tuple[str, float]]:
    yield "Mean lateness (ms):", metrics.late.mean_ms
    yield "P99 lateness (ms):", metrics.late.percentiles[99.0]
    yield "CPU (% of a core):", 100 * run.cpu_s / metrics.duration_s


def _named(name: str, spread: Spread) -> Mapping[str, float]:
    percentiles = {f"p{percentile:g}_{name}_ms": value for percentile, value in spread.percentiles.items()}
    return {f"mean_{name}_ms": spread.mean_ms, f"median_{name}_ms": spread.median_ms, f"std_{name}_ms": spread.std_ms, **percentiles}


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"
