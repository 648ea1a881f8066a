"""Figures are a pure function of times: exact on a schedule made by hand, and as they must relate on any schedule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.answers import Answer
from bench.serve.asks import Ask
from bench.serve.metrics import Metrics, measured, most_at_once, tokens_by_second
from bench.serve.report import Run, as_json, detailed, errors, table, warnings

RUN = Run(rate=float("inf"), max_concurrency=2, cpu_s=0.1)


def answer(
    arrival_s: float, token_s: list[float], *, due_s: float | None = None, late_s: float = 0.0, output_len: int | None = None
) -> Answer:
    due_s = arrival_s if due_s is None else due_s
    made = Answer(Ask("x", 10, len(token_s)), arrival_s, due_s, due_s + late_s, token_s=token_s, output_len=output_len)
    made.end(token_s[-1] if token_s else due_s, "" if token_s else "refused")
    return made


def test_a_schedule_made_by_hand():
    answers = [
        answer(0.0, [0.5, 0.6, 0.8]),
        answer(0.0, [1.5, 1.7], due_s=1.0, late_s=0.25),
        answer(1.0, [3.0], due_s=2.0, output_len=1),
        answer(2.0, []),
        Answer(Ask("x", 10, 5), 3.0),
    ]
    found = measured(answers, 4.0, (50.0, 100.0), {"ttft": 500.0, "tpot": 180.0})
    assert (found.completed, found.failed, found.aborted) == (3, 1, 1)
    assert (found.total_input_tokens, found.total_output_tokens) == (30, 6)
    assert (found.request_throughput, found.output_throughput, found.total_token_throughput) == (0.75, 1.5, 9.0)
    ttft, tpot, itl = found.spreads["ttft"], found.spreads["tpot"], found.spreads["itl"]
    assert ttft.mean_ms == pytest.approx((500 + 500 + 1000) / 3) and ttft.median_ms == pytest.approx(500)
    assert tpot.mean_ms == pytest.approx((150 + 200) / 2), "a single token has no time per token"
    assert itl.percentiles[50.0] == pytest.approx(200) and itl.percentiles[100.0] == pytest.approx(200)
    assert itl.std_ms == pytest.approx(np.std([100, 200, 200]))
    assert found.spreads["e2el"].mean_ms == pytest.approx((800 + 700 + 1000) / 3), "it counts from when the request was due"
    assert found.spreads["client_queue_time"].mean_ms == pytest.approx((0 + 1000 + 1000) / 3)
    assert found.late.percentiles[100.0] == pytest.approx(250)
    assert found.request_goodput == pytest.approx(1 / 4), "the first; the second is too slow per token, the third too late"
    assert found.max_concurrent_requests == 1


def test_the_servers_count_of_tokens_wins():
    found = measured([answer(0.0, [1.0, 2.0], output_len=5)], 2.0, (), {})
    assert found.total_output_tokens == 5 and found.spreads["tpot"].mean_ms == pytest.approx(250)
    assert found.request_goodput is None
    assert sum(tokens_by_second([answer(0.0, [1.0, 2.0], output_len=5)], 0.5)) * 0.5 == pytest.approx(5)


def test_nothing_succeeded_is_all_zeros():
    found = measured([answer(0.0, [])], 1.0, (99.0,), {})
    assert (found.completed, found.failed, found.output_throughput, found.max_output_tokens_per_s) == (0, 1, 0.0, 0.0)
    assert found.spreads["ttft"].percentiles[99.0] == 0.0


SPANS = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 10)).map(lambda span: (span[0], span[0] + span[1])), max_size=20)


@given(SPANS)
def test_most_at_once_is_what_counting_at_every_start_gives(spans):
    spans = [(start, end) for start, end in spans if end > start]
    slow = max((sum(start <= at < end for start, end in spans) for at, _ in spans), default=0)
    assert most_at_once(spans) == slow


GAPS = st.lists(st.floats(0.001, 2.0), min_size=1, max_size=12)
REQUESTS = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 3), GAPS), min_size=1, max_size=12)


@given(REQUESTS, st.floats(1, 100))
def test_figures_relate_as_they_must(requests, shift_s):
    def made(offset_s: float) -> Metrics:
        answers = [
            answer(offset_s + arrival, list(offset_s + arrival + queue + np.cumsum(gaps)), due_s=offset_s + arrival + queue)
            for arrival, queue, gaps in requests
        ]
        return measured(answers, 30.0, (50.0, 90.0, 99.0), {"e2el": 3000.0})

    found, later = made(0.0), made(shift_s)
    num_tokens = sum(len(gaps) for _, _, gaps in requests)
    assert found.total_output_tokens == num_tokens == later.total_output_tokens
    for name, spread in found.spreads.items():
        assert spread.mean_ms == pytest.approx(later.spreads[name].mean_ms, abs=1e-3), "the clock's zero means nothing"
        assert spread.percentiles[50.0] == pytest.approx(spread.median_ms)
        assert spread.percentiles[50.0] <= spread.percentiles[90.0] <= spread.percentiles[99.0]
    assert found.spreads["ttft"].mean_ms <= found.spreads["e2el"].mean_ms + 1e-6
    assert found.request_goodput == pytest.approx(sum(sum(gaps) <= 3.0 for _, _, gaps in requests) / 30, abs=2 / 30)
    assert 1 <= found.max_concurrent_requests <= len(requests)


def test_the_report_has_the_names_that_others_have():
    answers = [answer(0.0, [0.5, 0.6, 0.8]), answer(1.0, [])]
    found = measured(answers, 2.0, (50.0, 99.9), {"ttft": 1000.0})
    said = as_json(found, RUN, ("ttft", "itl"))
    assert {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"} <= said.keys()
    assert {"mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p50_ttft_ms", "p99.9_itl_ms", "output_throughput"} <= said.keys()
    assert "mean_tpot_ms" not in said, "it was not asked for"
    text = table(found, RUN, ("ttft", "itl"))
    assert "============ Serving Benchmark Result ============" in text and "P99.9 ITL (ms):" in text
    assert f"{'Successful requests:':<40} 1" in text and f"{'Request goodput (req/s):':<40} 0.50" in text
    assert list(errors(answers)) == ["1 x refused"]
    per_request = detailed(answers)
    assert per_request["itls"][0] == pytest.approx([0.1, 0.2]) and per_request["errors"] == ["", "refused"]


def test_a_generator_that_cannot_keep_up_says_so():
    late = measured([answer(0.0, [1.0], late_s=0.4)], 2.0, (), {})
    assert "late" in "".join(warnings(late, RUN)) and "400 ms" in "".join(warnings(late, RUN))
    prompt = measured([answer(0.0, [1.0])], 2.0, (), {})
    assert list(warnings(prompt, RUN)) == []
    assert "95% of a core" in "".join(warnings(prompt, Run(1.0, None, cpu_s=1.9)))
    assert "interrupted" in "".join(warnings(prompt, Run(1.0, None, 0.0, interrupted=True)))
