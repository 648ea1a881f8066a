"""From the times of answers to the figures people compare. Pure: the same answers give the same figures.

TTFT: due -> first token. ITL: between two events with tokens. TPOT: first -> last token over the tokens between. E2EL: due -> last token.
Where --max-concurrency holds a request back it is due when a slot is free, as in other tools; the wait before is `client_queue_time`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bench.serve.answers import Answer
from bench.serve.names import SERIES


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one answer. itl_s: one less than events with tokens."""

    ttft_s: float
    tpot_s: float
    e2el_s: float
    itl_s: tuple[float, ...]
    queue_s: float

    @classmethod
    def of(cls, answer: Answer) -> Times:
        """Of an answer that has succeeded. TPOT of a single token is 0."""
        first, last = answer.token_s[0], answer.token_s[-1]
        return cls(
            ttft_s=first - answer.due_s,
            tpot_s=(last - first) / (answer.num_output - 1) if answer.num_output > 1 else 0.0,
            e2el_s=last - answer.due_s,
            itl_s=tuple(after - before for before, after in pairwise(answer.token_s)),
            queue_s=answer.due_s - answer.arrival_s,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """One series in milliseconds; zeros where there is nothing. percentiles: by number."""

    mean_ms: float
    median_ms: float
    std_ms: float
    percentiles: Mapping[float, float]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Spread:
        """Of any number of values."""
        values = np.array(seconds or [0.0], np.float64) * 1e3
        found = {percentile: float(np.percentile(values, percentile)) for percentile in percentiles}
        return cls(float(values.mean()), float(np.median(values)), float(values.std()), found)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Everything a run is judged by. Throughputs are per second of duration_s, and count requests that succeeded.

    aborted: neither succeeded nor failed, since the run was interrupted. request_goodput: None where no goals were set.
    late: of requests sent, how long after they were due they left this process: the generator's own fault.
    """

    duration_s: float
    completed: int
    failed: int
    aborted: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    spreads: Mapping[str, Spread]
    late: Spread


def measured(answers: Sequence[Answer], duration_s: float, percentiles: Sequence[float], goals: Mapping[str, float]) -> Metrics:
    """Judge a run. goals: milliseconds by name (of GOALS); a request that meets all of them counts for goodput."""
    good = [answer for answer in answers if answer.succeeded]
    times = [Times.of(answer) for answer in good]
    num_input, num_output = sum(answer.num_prompt for answer in good), sum(answer.num_output for answer in good)
    return Metrics(
        duration_s=duration_s,
        completed=len(good),
        failed=sum(answer.ended and bool(answer.error) for answer in answers),
        aborted=sum(not answer.ended for answer in answers),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        request_throughput=len(good) / duration_s,
        request_goodput=sum(_meets(item, goals) for item in times) / duration_s if goals else None,
        output_throughput=num_output / duration_s,
        total_token_throughput=(num_input + num_output) / duration_s,
        max_output_tokens_per_s=float(max(tokens_by_second(good, 1.0), default=0.0)),
        max_concurrent_requests=most_at_once([(item.sent_s, item.end_s) for item in answers if item.ended and item.sent_s is not None]),
        spreads=_spreads(good, times, percentiles),
        late=Spread.of([answer.late_s for answer in answers if answer.sent_s is not None], (99.0, 100.0)),
    )


def _meets(times: Times, goals: Mapping[str, float]) -> bool:
    found = {"ttft": times.ttft_s, "tpot": times.tpot_s, "e2el": times.e2el_s}
    return all(found[name] * 1e3 <= limit_ms for name, limit_ms in goals.items())


def _spreads(good: Sequence[Answer], times: Sequence[Times], percentiles: Sequence[float]) -> dict[str, Spread]:
    values = {
        "ttft": [item.ttft_s for item in times],
        "tpot": [item.tpot_s for answer, item in zip(good, times, strict=True) if answer.num_output > 1],
        "itl": [gap for item in times for gap in item.itl_s],
        "e2el": [item.e2el_s for item in times],
        "client_queue_time": [item.queue_s for item in times],
    }
    return {name: Spread.of(values[name], percentiles) for name in SERIES}


def tokens_by_second(answers: Sequence[Answer], width_s: float) -> list[float]:
    """Output tokens per second in windows of width_s from when the first request was due.

    Events carry equal shares of their answer's tokens.
    """
    spoken = [answer for answer in answers if answer.token_s]
    if not spoken:
        return []
    start_s = min(answer.due_s for answer in spoken)
    when = np.concatenate([np.array(answer.token_s) for answer in spoken]) - start_s
    share = np.concatenate([np.full(len(answer.token_s), answer.num_output / len(answer.token_s)) for answer in spoken])
    counts = np.bincount((when / width_s).astype(np.int64), weights=share)
    return [float(count) / width_s for count in counts]


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """The largest number of (start, end) that overlap; one that starts as another ends does not overlap it."""
    steps = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return int(np.cumsum([step for _, step in steps]).max()) if steps else 0
