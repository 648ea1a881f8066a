"""What a run under faults found, as one value and as tables. Knows figures; not how they were obtained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from bench.chaos.faults import Record
from bench.chaos.judge import Findings, Promise
from bench.chaos.pauses import Row
from bench.machine import Machine


@dataclass(frozen=True, slots=True)
class Setup:
    """What was run on what. config: the settings that differ from their defaults. timed: whether pauses were judged."""

    machine: Machine
    model: str
    dtype: str
    config: Mapping[str, object]
    num_requests: int
    num_faults: int
    kinds: tuple[str, ...]
    concurrency: int
    deadline_s: float
    seed: int
    overlap: float
    timed: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Everything. undisturbed_s, disturbed_s: how long the runs took.

    num_differing: requests whose answers differed between two undisturbed runs, None in float32.
    """

    setup: Setup
    undisturbed_s: float
    disturbed_s: float
    num_differing: int | None
    records: tuple[Record, ...]
    findings: Findings


def print_result(console: Console, result: Result) -> None:
    """Tables, then the promises. Narrow enough for 80 columns."""
    setup, found = result.setup, result.findings
    _say(console, str(setup.machine))
    _say(console, f"{setup.model}, {setup.dtype}, " + ", ".join(f"{name} {value}" for name, value in setup.config.items()))
    _say(console, f"undisturbed {result.undisturbed_s:.0f} s, under faults {result.disturbed_s:.0f} s; seed {setup.seed}", "")
    _print_requests(console, found)
    _print_faults(console, found.rows)
    _say(console, "", "The longest pauses between two tokens:", *(f"  {line}" for line in found.longest), "")
    for promise in found.promises:
        _print_promise(console, promise)
    if not setup.timed:
        _say(console, "Pauses were not judged: the machine was not quiet.")


def _print_requests(console: Console, found: Findings) -> None:
    table = _table(Column(overflow="fold"), "")
    figures = {
        "requests": found.num_requests,
        "finished": found.num_finished,
        "went on elsewhere (over gRPC, as far as seen)": found.num_resumed,
        "sequences dispatched again" + _listed(found.retries): found.num_dispatched_again,
        "broke off because the router died, sent again": found.num_excused - found.num_alone,
        "found no router, sent again": found.num_alone,
        "refused for want of room, sent again": found.num_refused,
        "answers that differ" + _listed(found.flaws): sum(found.flaws.values()),
        "answers that differ where the model is undecided": found.num_ties,
        "errors" + _listed(found.errors): sum(found.errors.values()),
    }
    for name, number in figures.items():
        table.add_row(name, str(number))
    console.print(table)


def _print_faults(console: Console, rows: tuple[Row, ...]) -> None:
    columns = ("num", "skip", "struck", "pause s\nmedian", "\nmost", "\nlimit", "token 1\nmost", "whole s\nmedian", "\nmost")
    table = _table(Column(no_wrap=True), *columns)
    for row in rows:
        pause = f"{row.pause_median_s:.2f}", f"{row.pause_longest_s:.2f}", f"{row.limit_s:g}" if row.limit_s else ""
        whole = f"{row.whole_median_s:.1f}", f"{row.whole_longest_s:.1f}"
        table.add_row(row.label, str(row.num), str(row.num_skipped), str(row.num_struck), *pause, f"{row.first_longest_s:.2f}", *whole)
    console.print(table)
    _say(
        console,
        "struck: streams between two tokens when it struck; pause: the longest of these streams, per fault",
        "token 1: the longest wait for a first token; whole: until everything was in service again",
    )


def _print_promise(console: Console, promise: Promise) -> None:
    held = "holds: " if promise.holds else f"BROKEN ({promise.broken}): "
    console.print(f"{held}{promise.says}", style="green" if promise.holds else "bold red", highlight=False, markup=False, soft_wrap=True)
    _say(console, *(f"  {example}" for example in promise.examples if not promise.holds))


def _listed(counts: Mapping[str, int]) -> str:
    return f": {', '.join(f'{number} {name}' for name, number in sorted(counts.items()))}" if counts else ""


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(first: Column, *columns: str) -> Table:
    table = Table(first, box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
