"""What operators watch: log lines and Prometheus metrics. Knows names and units; knows nothing of how figures come about.

Every object here belongs to whoever made it: no registry or logger of the module's own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TextIO

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily

from baton.request import BlockCounts, Usage

CONTENT_TYPE = CONTENT_TYPE_LATEST
LEVELS = ("debug", "info", "warning", "error")
TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PULL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
AWAY_BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1800.0)
MAX_WORDS = 100  # different values of one label: causes come from peers, too, and every one costs memory for ever
OTHER = "other"


class LineFormatter(logging.Formatter):
    """One line per record: UTC time, level, logger, message, then `key=value` of `extra=fields(…)`, a traceback last."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; line breaks inside it are written as \\n."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facts = "".join(f" {key}={_plain(value)}" for key, value in record.__dict__.get("baton_fields", {}).items())
        line = f"{when}.{int(record.msecs):03d}Z {record.levelname:<7} {record.name} {record.getMessage()}{facts}"
        if record.exc_info:
            line += f" traceback={self.formatException(record.exc_info)}"
        return line.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def configure_logging(level: str = "info", stream: TextIO | None = None) -> None:
    """Send this process's log to `stream` (default stderr), one line per record. level: one of LEVELS. May be called again."""
    assert level in LEVELS, level
    sink = logging.StreamHandler(stream or sys.stderr)
    sink.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[sink], force=True)
    logging.captureWarnings(True)


def fields(**facts: object) -> dict[str, dict[str, object]]:
    """Facts for a log line: `log.info("finished", extra=fields(request=request_id, ttft_s=0.012))`."""
    return {"baton_fields": facts}


class Refusals:
    """What one door of this process has turned away, by reason. Owner: the thread that serves the door.

    The first of a reason is logged, then the second, fourth, eighth …: who is refused again and again fills no log.
    reason: a stable word. told: hears every reason, say to count it for /metrics.
    """

    def __init__(self, door: str, log: logging.Logger, told: Callable[[str], None] | None = None) -> None:
        self.counts: Tally[str] = Tally()
        self._door = door
        self._log = log
        self._told = told

    def add(self, reason: str, detail: object = "") -> None:
        """Something was refused. detail: for people, the peer's words at most as they are logged."""
        reason = _known_word(reason, self.counts)
        self.counts[reason] += 1
        count = self.counts[reason]
        if count & (count - 1) == 0:
            self._log.warning("refused", extra=fields(door=self._door, reason=reason, count=count, detail=str(detail)[:500]))
        if self._told is not None:
            self._told(reason)


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """What one group (a prefill node, or a data-parallel group of a decode node) last reported. steps and step_s only grow."""

    waiting: int
    running: int
    blocks: BlockCounts
    leases: int = 0
    pulls_open: int = 0
    steps: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PullFigures:
    """One finished pull. exposed_s: from the last announcement to the last verified read."""

    num_bytes: int
    pulled_blocks: int
    matched_blocks: int
    seconds: float
    exposed_s: float


class RouterMetrics:
    """Everything behind /metrics: the router's own figures and the latest of every group. Owner: the router's loop.

    next_token(seconds): a token event came so long after the one before it.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._groups = _GroupCollector()
        self._registry.register(self._groups)
        self._requests = Counter("baton_requests", "Requests that ended, by outcome", ["outcome"], registry=self._registry)
        self._prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of finished requests", registry=self._registry)
        self._cached_tokens = Counter("baton_cached_prompt_tokens", "Prompt tokens found in prefix trees", registry=self._registry)
        self._generation_tokens = Counter("baton_generation_tokens", "Tokens generated for finished requests", registry=self._registry)
        self._retries = Counter("baton_retries", "Sequences dispatched again, by cause", ["cause"], registry=self._registry)
        self._refused = Counter("baton_refused", "What a door has turned away, by reason", ["door", "reason"], registry=self._registry)
        self._deaths = Counter("baton_node_deaths", "Nodes that were given up as dead", ["node"], registry=self._registry)
        self._away_s = self._histogram("baton_node_away_seconds", "From a node's death to its return", AWAY_BUCKETS_S, ("node",))
        self._words: dict[str, dict[str, None]] = {"outcome": {}, "cause": {}, "node": {}}
        self._running = self._gauge("baton_requests_running", "Requests admitted and not ended")
        self._queued = self._gauge("baton_requests_queued", "Requests that wait for admission")
        self._ttft = self._histogram("baton_time_to_first_token_seconds", "From receipt to the first token", TTFT_BUCKETS_S)
        self._itl = _TokenTimes("baton_inter_token_seconds", "Between two token events of one sequence", ITL_BUCKETS_S)
        self._registry.register(self._itl)
        self.next_token = self._itl.observe
        self._e2e = self._histogram("baton_request_seconds", "From receipt to the terminal event", E2E_BUCKETS_S)
        labels = ("node", "group")
        self._pulls = Counter("baton_pulls", "Pulls that decode groups finished", labels, registry=self._registry)
        self._pulled_bytes = Counter("baton_pulled_bytes", "KV bytes pulled by decode groups", labels, registry=self._registry)
        self._pulled_blocks = Counter("baton_pulled_blocks", "KV blocks pulled by decode groups", labels, registry=self._registry)
        self._matched_blocks = Counter("baton_matched_blocks", "Prompt blocks decode groups held already", labels, registry=self._registry)
        self._pull_s = self._histogram("baton_pull_seconds", "From opening a pull to its last verified read", PULL_BUCKETS_S, labels)
        self._exposed_s = self._histogram("baton_pull_exposed_seconds", "Of it, what prefill did not hide", PULL_BUCKETS_S, labels)

    def load(self, running: int, queued: int) -> None:
        """Requests in the router now."""
        self._running.set(running)
        self._queued.set(queued)

    def first_token(self, seconds: float) -> None:
        """A request's first token left `seconds` after its receipt."""
        self._ttft.observe(seconds)

    def retry(self, cause: str) -> None:
        """A sequence is dispatched again, for a cause word of baton/errors.py."""
        self._retries.labels(self._word("cause", cause)).inc()

    def retries(self) -> dict[str, int]:
        """Sequences dispatched again so far, by cause."""
        samples = (sample for metric in self._retries.collect() for sample in metric.samples)
        return {sample.labels["cause"]: int(sample.value) for sample in samples if sample.name.endswith("_total")}

    def refused(self, door: str, reason: str) -> None:
        """A door of the router (http, grpc or control) has turned something away."""
        self._refused.labels(door, reason).inc()

    def refusals(self, door: str, log: logging.Logger) -> Refusals:
        """The book of one door, which is kept here as well."""
        return Refusals(door, log, lambda reason: self.refused(door, reason))

    def node_dead(self, node: str) -> None:
        """A node was given up as dead."""
        self._deaths.labels(self._word("node", node)).inc()

    def node_back(self, node: str, seconds: float) -> None:
        """A node serves again, `seconds` after it was given up."""
        self._away_s.labels(self._word("node", node)).observe(seconds)

    def finished(self, outcome: str, seconds: float, usage: Usage) -> None:
        """A request ended. outcome: a finish reason, or the cause word of its error."""
        self._requests.labels(self._word("outcome", outcome)).inc()
        self._e2e.observe(seconds)
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        self._generation_tokens.inc(usage.completion_tokens)

    def pulled(self, node: str, group: int, figures: PullFigures) -> None:
        """A decode group finished a pull."""
        labels = (node, str(group))
        self._pulls.labels(*labels).inc()
        self._pulled_bytes.labels(*labels).inc(figures.num_bytes)
        self._pulled_blocks.labels(*labels).inc(figures.pulled_blocks)
        self._matched_blocks.labels(*labels).inc(figures.matched_blocks)
        self._pull_s.labels(*labels).observe(figures.seconds)
        self._exposed_s.labels(*labels).observe(figures.exposed_s)

    def group(self, node: str, group: int, figures: GroupFigures) -> None:
        """A group reported; only the latest figures are kept."""
        self._groups.latest[node, str(group)] = figures

    def forget_group(self, node: str, group: int) -> None:
        """A group is gone: its gauges end with it."""
        self._groups.latest.pop((node, str(group)), None)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format; see CONTENT_TYPE."""
        return generate_latest(self._registry)

    def _word(self, label: str, word: str) -> str:
        known = self._words[label]
        word = _known_word(word, known)
        known[word] = None
        return word

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)


class _TokenTimes:
    """A histogram for what happens with every token. Prometheus' own looks through its buckets one by one and takes two locks."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one; a bucket holds what is at most its bound."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterator[Metric]:
        """The one histogram, in Prometheus' form."""
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum_s)


class _GroupCollector:
    """Turns the groups' own running totals into samples; entries live from a group's first report until it is forgotten."""

    def __init__(self) -> None:
        self.latest: dict[tuple[str, str], GroupFigures] = {}

    def collect(self) -> Iterator[Metric]:
        labels = ["node", "group"]
        waiting = GaugeMetricFamily("baton_sequences_waiting", "Sequences that wait on a group", labels=labels)
        running = GaugeMetricFamily("baton_sequences_running", "Sequences in a group's batch", labels=labels)
        leases = GaugeMetricFamily("baton_leases", "Leases open on a prefill group", labels=labels)
        pulls = GaugeMetricFamily("baton_pulls_open", "Pulls open on a group", labels=labels)
        blocks = GaugeMetricFamily("baton_blocks", "KV blocks of a group by state", labels=[*labels, "state"])
        steps = CounterMetricFamily("baton_steps", "Steps a group has run", labels=labels)
        step_s = SummaryMetricFamily("baton_step_seconds", "Time a group was busy with steps", labels=labels)
        for key, now in self.latest.items():
            for family, value in ((waiting, now.waiting), (running, now.running), (leases, now.leases), (pulls, now.pulls_open)):
                family.add_metric(key, value)
            for state, count in _states(now.blocks):
                blocks.add_metric([*key, state], count)
            steps.add_metric(key, now.steps)
            step_s.add_metric(key, now.steps, now.step_s)
        yield from (waiting, running, leases, pulls, blocks, steps, step_s)


def _known_word(word: str, known: Mapping[str, object]) -> str:
    """The word, unless it is a new one and there are MAX_WORDS already."""
    return word if word in known or len(known) < MAX_WORDS else OTHER


def _states(blocks: BlockCounts) -> tuple[tuple[str, int], ...]:
    return (("free", blocks.free), ("cached", blocks.cached), ("held", blocks.held), ("quarantined", blocks.quarantined))


def _plain(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text and not set(text) & set(' ="\n\r\t') else json.dumps(text)
