"""Many seeds at once, each in one of a few processes, or one seed told as it happens.

    python -m simulator --seeds 10000 --jobs 2      every seed from 0 on; exit code 1, and how to replay them, if any breaks a promise
    python -m simulator --seed 4711 --trace         that one again, event by event
    python -m simulator --seeds 300 --planted lost-cancel      are planted bugs found?

Processes are started with the same PYTHONHASHSEED, so that a seed means the same everywhere; they report in lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from selectors import EVENT_READ, DefaultSelector
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from simulator.groups import make_leader
from simulator.planted import PLANTED
from simulator.world import Report, Simulator

HASH_SEED = "0"
MAX_SHOWN = 10
_TOLD = tuple(known.name for known in fields(Report))


@dataclass(slots=True)
class Summary:
    """What came of many seeds."""

    num_schedules: int = 0
    virtual_s: float = 0.0
    num_events: int = 0
    cpu_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seasons: Counter[str] = field(default_factory=Counter)
    broken: dict[int, str] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """One more report, as a worker wrote it."""
        told = json.loads(line)
        self.num_schedules += 1
        self.virtual_s += told["virtual_s"]
        self.num_events += told["num_events"]
        self.cpu_s += told["cpu_s"]
        self.faults.update(told["faults"])
        self.counts.update(told["counts"])
        self.seasons[told["season"]] += 1
        if told["error"]:
            self.broken[told["seed"]] = told["error"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    options = _parser().parse_args(argv)
    if options.seed is None and options.worker is None:
        return _run_all(options)
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        arguments = sys.argv[1:] if argv is None else list(argv)
        return subprocess.run([sys.executable, "-m", "simulator", *arguments], env=_environment(), check=False).returncode
    if options.seed is not None:
        return _replay(options.seed, options.planted, options.trace)
    _work(range(*options.worker), options.planted)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulator", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many schedules to run (1000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes to run them in (the number of cores)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="run this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every message, fault and log line")
    parser.add_argument("--planted", choices=sorted(PLANTED), metavar="BUG", help=f"plant a bug: {', '.join(sorted(PLANTED))}")
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": HASH_SEED}


@contextmanager
def _simulator(planted: str | None, trace: bool = False) -> Iterator[Simulator]:
    with ExitStack() as stack:
        leader = stack.enter_context(PLANTED[planted]()) if planted else make_leader
        yield stack.enter_context(Simulator(print if trace else None, leader))


def _work(seeds: range, planted: str | None) -> None:
    with _simulator(planted) as simulator:
        for seed in seeds:
            began_s = time.process_time()
            report = simulator.run(seed)
            told = {name: getattr(report, name) for name in _TOLD}
            print(json.dumps({**told, "cpu_s": time.process_time() - began_s}), flush=True)


def _replay(seed: int, planted: str | None, trace: bool) -> int:
    with _simulator(planted, trace) as simulator:
        report = simulator.run(seed)
    _print_one(report)
    return 1 if report.error else 0


def _print_one(report: Report) -> None:
    print(f"seed {report.seed} ({report.season}): {report.virtual_s:.3f} s of virtual time, {report.num_events:,} events")
    print(f"digest {report.digest}")
    print(f"faults: {_listed(report.faults)}; {_listed(report.counts)}")
    print(f"BROKEN: {report.error}" if report.error else "every promise was kept")


def _run_all(options: argparse.Namespace) -> int:
    console = Console(stderr=True)
    began_s = time.monotonic()
    summary = Summary()
    with _bars(console) as bars:
        bar = bars.add_task("schedules", total=options.seeds)
        for line in _lines(options):
            summary.add(line)
            bars.advance(bar)
    show(Console(), summary, time.monotonic() - began_s, options.planted)
    if summary.num_schedules != options.seeds:
        print(f"only {summary.num_schedules} of {options.seeds} schedules were run: a worker has died", file=sys.stderr)
        return 2
    return 1 if summary.broken else 0


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _lines(options: argparse.Namespace) -> Iterator[str]:
    """What the workers write, line by line, until the last of them has ended."""
    last = options.first + options.seeds
    planted = ["--planted", options.planted] if options.planted else []
    with ExitStack() as stack, DefaultSelector() as selector:
        for job in range(min(options.jobs, options.seeds)):
            command = [sys.executable, "-m", "simulator", *planted, "--worker"]
            seeds = [str(options.first + job), str(last), str(options.jobs)]
            worker = subprocess.Popen([*command, *seeds], env=_environment(), stdout=subprocess.PIPE, text=True)
            stack.enter_context(worker)
            stack.callback(worker.kill)
            assert worker.stdout is not None
            selector.register(worker.stdout, EVENT_READ)
        yield from _read(selector)


def _read(selector: DefaultSelector) -> Iterator[str]:
    while selector.get_map():
        for key, _ in selector.select():
            stream: IO[str] = key.fileobj  # type: ignore[assignment]
            line = stream.readline()
            if line:
                yield line
            else:
                selector.unregister(stream)


def show(console: Console, summary: Summary, seconds: float, planted: str | None = None) -> None:
    """Print what came of it, and how to see what went wrong again."""
    table = Table(show_header=False, box=None)
    table.add_row(
        "schedules",
        f"{summary.num_schedules} in {seconds:.0f} s ({1000 * summary.cpu_s / max(1, summary.num_schedules):.0f} ms of CPU each)",
    )
    table.add_row("virtual time", f"{summary.virtual_s / 3600:.1f} hours, {summary.num_events:,} events")
    table.add_row("seasons", _listed(summary.seasons))
    table.add_row("faults", _listed(summary.faults))
    for what, counts in _grouped(summary.counts).items():
        table.add_row(what, _listed(counts))
    table.add_row("broken promises", str(len(summary.broken)))
    console.print(table)
    for seed, error in sorted(summary.broken.items())[:MAX_SHOWN]:
        bug = f" --planted {planted}" if planted else ""
        console.print(f"{error}\n    python -m simulator --seed {seed}{bug} --trace", highlight=False, markup=False, soft_wrap=True)


def _grouped(counts: Counter[str]) -> dict[str, Counter[str]]:
    """ "outcome finished" and the like under their first words; what stands alone under "also"."""
    grouped: dict[str, Counter[str]] = {"outcomes": Counter(), "retries": Counter(), "messages": Counter(), "also": Counter()}
    firsts = {"outcome": "outcomes", "retries": "retries", "messages": "messages"}
    for name, count in counts.items():
        first, _, rest = name.partition(" ")
        grouped[firsts.get(first, "also")][rest if first in firsts else name] += count
    return grouped


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common()) or "none"
