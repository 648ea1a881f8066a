"""Results become tables without loss: medians, ratios, who met what; only what is between the marks of the page changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.errors import ConfigError
from bench.suite.__main__ import NAMES, main
from bench.suite.facts import write
from bench.suite.render import BEGIN, END, median_ratio, read, rendered, replaced
from bench.suite.rows import PARTS, ROWS, Goal, medians, ratio

FACTS = {
    "date": "2026-01-01 00:00",
    "machine": {"processor": "P", "instructions": "I", "cores": 2, "threads": 2, "python": "3", "torch": "2"},
    "commit": "abc",
    "dirty": True,
    "peer": "vLLM 1",
    "ruler": "r",
    "scale": 1.0,
}


def side_by_side(ours: list[float], theirs: list[float]) -> dict[str, object]:
    rounds = [
        {
            "system": system,
            "round": i + 1,
            "output_throughput": value,
            "mean_ttft_ms": 10.0,
            "mean_tpot_ms": 1.0,
            "p99_itl_ms": 2.0,
            "ready_s": 5.0,
        }
        for system, values in (("baton", ours), ("vllm", theirs))
        for i, value in enumerate(values)
    ]
    return {**FACTS, "rounds": rounds}


def test_medians_and_ratios():
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}
    assert ratio({"a": 3.0}, {"a": 2.0}, "a") == 1.5
    assert ratio({"a": 3.0}, {}, "a") is None and ratio({}, {"a": 1.0}, "a") is None and ratio({"a": 3.0}, {"a": 0.0}, "a") is None


@pytest.mark.parametrize(("goal", "good", "bad"), [(Goal("x", 1.4, at_least=True), 1.4, 1.39), (Goal("x", 0.5), 0.5, 0.51)])
def test_goals(goal, good, bad):
    assert goal.met(good) and not goal.met(bad)


def test_a_row_shows_medians_and_what_was_asked():
    text = rendered({"50-50-128": side_by_side([300.0, 100.0, 200.0], [100.0])})
    assert "| qwen3-60m, 50/50, concurrency 128 | output tok/s | 200.0 | 100.0 | 2.00 | ≥ 1.4 ✓ |" in text
    assert "|  | mean TTFT ms | 10.0 | 10.0 | 1.00 | ≤ 0.6 ✗ |" in text
    assert "| qwen3-60m | 5.0 | 5.0 | 1.00 | ≤ 0.25 ✗ |" in text
    assert "| 50-50-128 | 2026-01-01 00:00 | abc and changes | 3 | r | vLLM 1 |" in text and "Machine: P, I, 2 cores" in text


def test_without_a_peer_there_are_no_ratios():
    text = rendered({"50-50-1": side_by_side([7.0], [])})
    assert "| output tok/s | 7.0 | – | – |  |" in text and "✗" not in text


def test_experiments():
    gaps = [("baton", 10.0, 12.0), ("baton", 10.0, 20.0), ("baton", 10.0, 11.0), ("vllm", 10.0, 90.0)]
    rounds = [
        {
            "system": s,
            "round": 1,
            "undisturbed_p99_itl_ms": a,
            "disturbed_p99_itl_ms": b,
            "prompts_offered_per_s": 0.7,
            "prompts_possible_per_s": 1.0,
        }
        for s, a, b in gaps
    ]
    text = rendered({"disaggregation": {**FACTS, "rounds": rounds}})
    assert "| baton | 10.0 | 12.0 | 1.20 (≤ 1.3 asked ✓) | 0.70 of 1.00 |" in text and "| vllm | 10.0 | 90.0 | 9.00 |" in text
    assert median_ratio(rounds, "baton") == pytest.approx(1.2)
    both = [{"system": "baton", "round": 1, "output_throughput": 900.0}, {"system": "transformers", "round": 1, "output_throughput": 300.0}]
    assert "| output tok/s | 900 | 300 | 3.00 | ≥ 3 ✓ |" in rendered({"transformers": {**FACTS, "rounds": both}})
    one = {
        "mflop_per_output": 183.0,
        "peak_gflops": 400.0,
        "tokens_per_s": 2186.0,
        "output_throughput": 1093.0,
        "share": 0.5,
        "gemm_s": 8.0,
        "gemm_share": 0.64,
    }
    one |= {f"cpu_{part}_s": 1.0 for part in PARTS}
    text = rendered({"bound": {**FACTS, "rounds": [{"system": "baton", "round": 1, **one}]}})
    assert "2186 tok/s. Baton reached 1093, 50% of it" in text and "64% of what both ranks used in all" in text and "✓" in text


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = f"before\n{BEGIN}\nold \\1\n{END}\nafter\n"
    assert replaced(page, r"new \g<0>") == f"before\n{BEGIN}\n\nnew \\g<0>\n\n{END}\nafter\n"
    assert replaced(replaced(page, "x"), "x") == replaced(page, "x")
    with pytest.raises(ConfigError):
        replaced("nothing", "x")


def test_render_reads_the_results_and_writes_the_page(tmp_path, capsys):
    write(tmp_path / "50-50-128.json", side_by_side([200.0], [100.0]))
    (tmp_path / "page.md").write_text(f"# T\n{BEGIN}{END}\n")
    words = ["--render", "--results", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert main(words) == 0
    assert "2.00 | ≥ 1.4 ✓" in (tmp_path / "page.md").read_text()
    assert list(read(tmp_path, NAMES)) == ["50-50-128"]
    assert main(["--render", "--page", str(tmp_path / "none.md")]) == 2
    assert "none.md cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fast"], "fast is no row"),
        (["--peer", "/nowhere"], "peer_vllm.sh"),
        (["--rounds", "0"], "--rounds"),
        (["--ruler", "vllm"], "--peer DIR"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_the_page_of_this_repository_can_be_rendered():
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "x" in replaced(page, "x")


def test_rows_are_those_of_the_table():
    assert [(row.input_len, row.output_len, row.concurrency, row.num_prompts) for row in ROWS] == [
        (50, 50, 128, 256),
        (512, 128, 16, 64),
        (50, 50, 1, 16),
        (128, 128, 32, 128),
    ]
