"""Log lines stay one line each, and metrics come out under their names with what was put in."""

import io
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from baton.request import BlockCounts, Usage
from baton.telemetry import ITL_BUCKETS_S, MAX_WORDS, GroupFigures, LineFormatter, PullFigures, RouterMetrics, configure_logging, fields


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    sink = logging.StreamHandler(stream)
    sink.setFormatter(LineFormatter())
    logger = logging.Logger("router.test")
    logger.addHandler(sink)
    yield logger, stream


def samples(metrics: RouterMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def test_a_record_is_one_line_with_its_fields(log):
    logger, stream = log
    logger.info("finished %d", 3, extra=fields(request="r-1", ttft_s=0.01234567, note="two words\nand a line", empty=""))
    when, rest = stream.getvalue().split(" ", 1)
    assert len(when) == len("2025-01-01T00:00:00.000Z") and when.endswith("Z")
    assert rest == 'INFO    router.test finished 3 request=r-1 ttft_s=0.0123457 note="two words\\\\nand a line" empty=""\n'


def test_a_traceback_stays_on_the_line(log):
    logger, stream = log
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        logger.exception("it broke", extra=fields(request="r-2"))
    (line,) = stream.getvalue().splitlines()
    assert "request=r-2 traceback=Traceback (most recent call last):\\n" in line and line.endswith("ValueError: bad\\nthing")


def test_logging_is_configured_once_more_without_doubling():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    try:
        configure_logging("warning", stream)
        configure_logging("info", stream)
        logging.getLogger("some.where").info("hello")
        logging.getLogger("some.where").debug("not this")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
    assert stream.getvalue().count("hello") == 1 and "not this" not in stream.getvalue()


def test_request_metrics():
    metrics = RouterMetrics()
    metrics.load(running=3, queued=2)
    metrics.first_token(0.02)
    metrics.next_token(0.004)
    metrics.next_token(0.006)
    metrics.retry("node_lost")
    metrics.finished("stop", 1.5, Usage(10, 4, 8))
    metrics.finished("queue_full", 0.001, Usage())
    found = samples(metrics)
    assert found["baton_requests_running", ()] == 3 and found["baton_requests_queued", ()] == 2
    assert found["baton_requests_total", (("outcome", "stop"),)] == 1
    assert found["baton_requests_total", (("outcome", "queue_full"),)] == 1
    assert found["baton_retries_total", (("cause", "node_lost"),)] == 1
    assert found["baton_time_to_first_token_seconds_count", ()] == 1
    assert found["baton_inter_token_seconds_bucket", (("le", "0.005"),)] == 1
    assert found["baton_request_seconds_sum", ()] == pytest.approx(1.501)
    assert found["baton_prompt_tokens_total", ()] == 10 and found["baton_generation_tokens_total", ()] == 4
    assert found["baton_cached_prompt_tokens_total", ()] == 8


@given(st.lists(st.sampled_from(ITL_BUCKETS_S) | st.floats(0, 100), max_size=20))
def test_times_between_tokens_are_counted_as_prometheus_counts(times):
    metrics, registry = RouterMetrics(), CollectorRegistry()
    reference = Histogram("baton_inter_token_seconds", "x", buckets=ITL_BUCKETS_S, registry=registry)
    for seconds in times:
        metrics.next_token(seconds)
        reference.observe(seconds)
    expected = {
        (s.name, tuple(s.labels.items())): s.value for m in registry.collect() for s in m.samples if not s.name.endswith("_created")
    }
    found = samples(metrics)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_group_metrics_are_the_latest_and_end_with_the_group():
    metrics = RouterMetrics()
    blocks = BlockCounts(total=10, free=4, cached=3, held=2, quarantined=1)
    metrics.group("decode-0", 1, GroupFigures(9, 9, blocks))
    metrics.group("decode-0", 1, GroupFigures(waiting=1, running=2, blocks=blocks, leases=3, pulls_open=4, steps=7, step_s=0.5))
    metrics.pulled("decode-0", 1, PullFigures(num_bytes=4096, pulled_blocks=3, matched_blocks=1, seconds=0.02, exposed_s=0.001))
    found, labels = samples(metrics), (("group", "1"), ("node", "decode-0"))
    assert [found[f"baton_{name}", labels] for name in ("sequences_waiting", "sequences_running", "leases", "pulls_open")] == [1, 2, 3, 4]
    assert {key[1][2][1]: value for key, value in found.items() if key[0] == "baton_blocks"} == {
        "free": 4,
        "cached": 3,
        "held": 2,
        "quarantined": 1,
    }
    assert found["baton_steps_total", labels] == 7 and found["baton_step_seconds_sum", labels] == 0.5
    assert found["baton_pulls_total", labels] == 1 and found["baton_pulled_bytes_total", labels] == 4096
    assert found["baton_pulled_blocks_total", labels] == 3 and found["baton_matched_blocks_total", labels] == 1
    metrics.forget_group("decode-0", 1)
    metrics.forget_group("decode-0", 1)
    assert not any(name.startswith("baton_blocks") for name, _ in samples(metrics))


def test_refusals_are_counted_and_logged_ever_more_rarely(log):
    logger, stream = log
    metrics = RouterMetrics()
    book = metrics.refusals("http", logger)
    for number in range(9):
        book.add("too_large", f"body {number}\n" + "x" * 1000)
    book.add("nonce")
    assert samples(metrics)["baton_refused_total", (("door", "http"), ("reason", "too_large"))] == 9
    assert samples(metrics)["baton_refused_total", (("door", "http"), ("reason", "nonce"))] == 1
    lines = stream.getvalue().splitlines()
    assert [f"count={count} " in line for count, line in zip((1, 2, 4, 8), lines, strict=False)] == [True] * 4 and len(lines) == 5
    assert "body 7" in lines[3] and max(map(len, lines)) < 700


def test_words_of_peers_do_not_become_labels_without_end():
    metrics = RouterMetrics()
    book = metrics.refusals("control", logging.Logger("test", logging.CRITICAL))
    for number in range(3 * MAX_WORDS):
        metrics.retry(f"word_{number}")
        metrics.finished(f"word_{number}", 1.0, Usage())
        metrics.node_dead(f"node-{number}")
        book.add(f"word_{number}")
    found = samples(metrics)
    for name in ("baton_retries_total", "baton_requests_total", "baton_node_deaths_total", "baton_refused_total"):
        values = [value for key, value in found.items() if key[0] == name]
        assert len(values) == MAX_WORDS + 1 and max(values) == 2 * MAX_WORDS, name


def test_nodes_that_die_and_come_back():
    metrics = RouterMetrics()
    metrics.node_dead("decode-1")
    metrics.node_back("decode-1", 12.5)
    found, label = samples(metrics), (("node", "decode-1"),)
    assert found["baton_node_deaths_total", label] == 1
    assert (found["baton_node_away_seconds_count", label], found["baton_node_away_seconds_sum", label]) == (1, 12.5)


def test_two_routers_in_one_process_share_nothing():
    one, other = RouterMetrics(), RouterMetrics()
    one.load(5, 0)
    assert samples(other)["baton_requests_running", ()] == 0
