"""The frame of the micro-benchmarks, and that each of those here measures what it says, at sizes that take no time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.micro import __main__ as main
from bench.micro import growth, transports
from bench.micro.limits import Limits
from bench.micro.report import save, table
from bench.micro.row import Row
from bench.pull import Seen, Spent, rows, spent


def test_a_ratio_is_the_value_over_its_limit_or_nothing() -> None:
    assert Row("x", 3.0, "GB/s", 12.0, "memcpy").ratio == 0.25
    assert Row("x", 3.0, "GB/s").ratio is None


def test_a_table_has_a_line_per_row_with_columns_under_each_other() -> None:
    lines = table([Row("shm", 9.5, "GB/s", 12.0, "memcpy"), Row("a longer name", 12345.6, "ms")]).splitlines()
    assert lines == ["shm               9.5 GB/s  memcpy 12  0.79", "a longer name  12,346 ms"]
    assert table([]) == ""


def test_results_are_kept_beside_those_of_other_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "results" / "micro.json"
    save(path, "one machine", {"a": [Row("x", 1.0, "ms", 2.0, "y")], "b": []})
    save(path, "another machine", {"b": [Row("z", 5.0, "ms")]})
    kept = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    assert kept["a"] == {
        "machine": "one machine",
        "rows": [{"what": "x", "value": 1.0, "unit": "ms", "limit": 2.0, "limit_name": "y", "ratio": 0.5}],
    }
    assert (kept["b"]["machine"], kept["b"]["rows"][0]["ratio"]) == ("another machine", None)


def test_the_command_runs_what_it_is_told_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(limits: Limits) -> Iterator[Row]:
        yield Row("first thing", 1.0, "ms")

    def other(limits: Limits) -> Iterator[Row]:
        raise AssertionError("not asked for")

    monkeypatch.setattr(main, "BENCHMARKS", {"one": one, "other": other})
    main.main(["one", "--output", str(tmp_path / "micro.json")])
    assert "first thing" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "micro.json").read_text(encoding="utf-8"))["benchmarks"]) == ["one"]
    with pytest.raises(SystemExit):
        main.main(["neither"])


def test_cases_have_the_spans_that_they_name() -> None:
    found = {case.what: case for case in transports.cases()}
    assert [found[f"spans of {nbytes >> 10} KiB"].source.block_bytes for nbytes in transports.SPAN_BYTES] == list(transports.SPAN_BYTES)
    assert found["qwen3-60m, blocks of 16"].source.block_bytes == 196_608
    assert all(case.num_blocks <= case.source.num_blocks for case in found.values())


@pytest.mark.parametrize("transport", transports.TRANSPORTS)
def test_a_transport_is_measured_over_reads_that_arrive(transport: transports.Transport) -> None:
    case = next(case for case in transports.cases(8 << 20) if case.what == "qwen3-60m, a prompt of 50")
    row = transports.measured(case, transport)
    assert row.value > 0 and row.limit and row.limit_name == "memcpy" and row.what.startswith(transport)


def test_orders_never_have_two_blocks_that_merge_more_than_by_chance() -> None:
    case = next(transports.cases(64 << 20))
    source, target = next(transports.orders(case))
    assert len(set(source)) == len(source) == case.num_blocks == len(set(target))
    merged = np.count_nonzero((np.diff(source) == 1) & (np.diff(target) == 1))
    assert merged < case.num_blocks // 100


def test_what_a_call_takes_is_seen_at_its_peak() -> None:
    """Memory that it has given back at its end counts."""

    def taking(nbytes: int) -> object:
        return growth.peak_bytes(lambda _: int(np.ones(nbytes, np.uint8)[-1]))

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here")
    assert growth.peak_bytes(lambda _: 0) < 16 << 20
    assert taking(64 << 20) > 48 << 20


def test_readings_become_figures_per_prompt() -> None:
    before = {"prefill baton_step_seconds_sum": 1.0, "decode cpu": 5.0}
    after = {"prefill baton_step_seconds_sum": 3.0, "decode cpu": 5.5, "decode baton_pulled_bytes_total": 8e6}
    assert spent(before, after, 4) == Spent(0.5, 0.0, 0.0, 2e6, 0.0, 0.125)


def test_exposed_time_is_told_as_a_share_of_prefill() -> None:
    cost = Spent(prefill_s=0.5, pull_s=0.1, exposed_s=0.01, pulled_bytes=2e6, prefill_cpu_s=0.6, decode_cpu_s=0.1)
    seen = [Seen(0.6, 0.03, 0.01), Seen(0.6, 0.04, 0.01), Seen(0.6, 0.5, 0.01)]
    found = {row.what: row for row in rows("9 tokens", seen, cost)}
    assert found["9 tokens: exposed, decode's figure"].ratio == pytest.approx(0.02)
    assert found["9 tokens: exposed, client's figure"].value == pytest.approx(30.0)
    assert found["9 tokens: bytes over exposed time"].value == pytest.approx(0.2)
