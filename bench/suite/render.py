"""From results to the tables of docs/performance.md. Pure but for reading and writing those files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from bench.suite.rows import DISTURBED_LIMIT, GEMM_SHARE, GENERATE_GOAL, PARTS, ROWS, START_GOAL, Goal, Row, medians, ratio

BEGIN, END = "<!-- results: written by python -m bench.suite --render -->", "<!-- end of results -->"
_NAMES = {"output_throughput": "output tok/s", "mean_ttft_ms": "mean TTFT ms", "mean_tpot_ms": "mean TPOT ms", "p99_itl_ms": "p99 ITL ms"}
Result = Mapping[str, Any]


def rendered(results: Mapping[str, Result]) -> str:
    """Markdown for all results there are, by row's name."""
    parts = [*_side_by_side(results), *_start(results), *_generate(results), *_streams(results), *_bound(results), *_facts(results)]
    return "\n".join(parts) if parts else "No results yet: `make bench`."


def _side_by_side(results: Mapping[str, Result]) -> Iterator[str]:
    known = [row for row in ROWS if row.name in results]
    if known:
        yield "| load | figure | Baton | vLLM | Baton / vLLM | asked |\n|---|---|--:|--:|--:|--:|"
        yield from (line for row in known for line in _row(row, results[row.name]["rounds"]))
        yield ""


def _row(row: Row, rounds: Sequence[Result]) -> Iterator[str]:
    ours, theirs = of_system(rounds, "baton"), of_system(rounds, "vllm")
    asked = {goal.key: goal for goal in row.goals}
    label = row.said
    for key, name in _NAMES.items():
        shown = key in asked or key == "output_throughput"
        if shown and key in ours:
            judged = _judged(ratio(ours, theirs, key), asked.get(key))
            yield f"| {label} | {name} | {ours[key]:.1f} | {_number(theirs.get(key))} | {judged} |"
            label = ""


def _start(results: Mapping[str, Result]) -> Iterator[str]:
    known = [row for row in ROWS if row.name in results]
    if known:
        yield "| start to ready | Baton s | vLLM s | Baton / vLLM | asked |\n|---|--:|--:|--:|--:|"
    for model in dict.fromkeys(row.model for row in known):
        rounds = [found for row in known if row.model == model for found in results[row.name]["rounds"]]
        ours, theirs = of_system(rounds, "baton"), of_system(rounds, "vllm")
        judged = _judged(ratio(ours, theirs, "ready_s"), START_GOAL)
        yield f"| {model} | {ours['ready_s']:.1f} | {_number(theirs.get('ready_s'))} | {judged} |"
    if known:
        yield ""


def _generate(results: Mapping[str, Result]) -> Iterator[str]:
    if found := results.get("transformers"):
        ours, theirs = of_system(found["rounds"], "baton"), of_system(found["rounds"], "transformers")
        share = _judged(ratio(ours, theirs, "output_throughput"), GENERATE_GOAL)
        yield "| 128 at once, 50/50 | Baton | `transformers` in batches of 128 | Baton / it | asked |\n|---|--:|--:|--:|--:|"
        yield f"| output tok/s | {ours['output_throughput']:.0f} | {theirs['output_throughput']:.0f} | {share} |\n"


def _streams(results: Mapping[str, Result]) -> Iterator[str]:
    if found := results.get("disaggregation"):
        yield "| 16 streams | p99 ITL undisturbed ms | under prompts ms | ratio | prompts/s offered of possible |\n|---|--:|--:|--:|--:|"
        for system in dict.fromkeys(item["system"] for item in found["rounds"]):
            middle = of_system(found["rounds"], system)
            share = median_ratio(found["rounds"], system)
            asked = f" (≤ {DISTURBED_LIMIT} asked{_mark(share <= DISTURBED_LIMIT)})" if system == "baton" else ""
            offered = f"{middle['prompts_offered_per_s']:.2f} of {middle['prompts_possible_per_s']:.2f}"
            gaps = f"{middle['undisturbed_p99_itl_ms']:.1f} | {middle['disturbed_p99_itl_ms']:.1f}"
            yield f"| {system} | {gaps} | {share:.2f}{asked} | {offered} |"
        yield ""


def median_ratio(rounds: Sequence[Result], system: str) -> float:
    """Of a system's rounds, the median of disturbed over undisturbed: both were measured on one server, minutes apart."""
    of_rounds = [
        {"ratio": found["disturbed_p99_itl_ms"] / found["undisturbed_p99_itl_ms"]} for found in rounds if found["system"] == system
    ]
    return medians(of_rounds)["ratio"]


def _bound(results: Mapping[str, Result]) -> Iterator[str]:
    if found := results.get("bound"):
        middle = of_system(found["rounds"], "baton")
        yield (
            f"Bound of {ROWS[0].said}: {middle['mflop_per_output']:.0f} MFLOP per output token with its prompt token, at a peak of "
            f"{middle['peak_gflops']:.0f} GFLOP/s measured in the same minutes: {middle['tokens_per_s']:.0f} tok/s. Baton reached "
            f"{middle['output_throughput']:.0f}, {middle['share']:.0%} of it.\n"
        )
        parts = ", ".join(f"{part} {middle[f'cpu_{part}_s']:.1f}" for part in PARTS)
        yield (
            f"CPU seconds of Baton under that load: {parts}. Its matrix products alone take {middle['gemm_s']:.1f} core seconds, "
            f"{middle['gemm_share']:.0%} of what both ranks used in all (≥ 60 % asked{_mark(middle['gemm_share'] >= GEMM_SHARE)}).\n"
        )


def _facts(results: Mapping[str, Result]) -> Iterator[str]:
    if results:
        yield "| result | measured | commit | rounds | load generator | peer |\n|---|---|---|--:|---|---|"
    for name, found in results.items():
        dirty = " and changes" if found["dirty"] else ""
        num_rounds = max(item["round"] for item in found["rounds"])
        smaller = "" if found.get("scale", 1.0) == 1.0 else f", {found['scale']:g} of the prompts"
        when, by = f"{found['date']} | {found['commit']}{dirty}", f"{found['ruler']} | {found['peer'] or 'none'}"
        yield f"| {name} | {when} | {num_rounds}{smaller} | {by} |"
    machines = dict.fromkeys(_machine(found["machine"]) for found in results.values())
    yield from (f"\n{machine}" for machine in machines)


def _machine(machine: Mapping[str, Any]) -> str:
    runs = f"Python {machine['python']}, torch {machine['torch']}"
    return f"Machine: {machine['processor']}, {machine['instructions']}, {machine['cores']} cores; {runs}."


def of_system(rounds: Sequence[Result], system: str) -> dict[str, float]:
    """The medians of one system's figures."""
    mine = [found for found in rounds if found["system"] == system]
    return medians([{key: value for key, value in found.items() if key not in ("system", "round")} for found in mine])


def _judged(found: float | None, goal: Goal | None) -> str:
    """Two cells: the ratio, and what was asked of it."""
    if found is None:
        return f"– | {goal.said() if goal else ''}"
    return f"{found:.2f} | {goal.said() + _mark(goal.met(found)) if goal else ''}"


def _mark(met: bool) -> str:
    return " ✓" if met else " ✗"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def read(folder: Path, names: Sequence[str]) -> dict[str, Result]:
    """The results there are, in the order of names."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def replaced(page: str, content: str) -> str:
    """The page with new content between its two marks. Raises ConfigError if they are not there."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ConfigError(f"the page must hold once: {BEGIN} … {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{content}\n\n{END}", page)
