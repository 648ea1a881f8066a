"""`python -m bench.micro [name ...]`: runs micro-benchmarks, prints what they found, keeps it in bench/results/micro.json."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.machine import Machine
from bench.micro import attention, gemm, growth, scheduler, step, transports
from bench.micro.limits import Limits
from bench.micro.report import save, table
from bench.micro.row import Row

Benchmark = Callable[[Limits], Iterator[Row]]
BENCHMARKS: dict[str, Benchmark] = {
    "transports": transports.rows,
    "growth": growth.rows,
    "attention": attention.rows,
    "gemm": gemm.rows,
    "scheduler": scheduler.rows,
    "step": step.rows,
}
RESULTS = Path(__file__).resolve().parent.parent / "results" / "micro.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """See --help."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="name", help=f"of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are kept as JSON (%(default)s)")
    asked = parser.parse_args(arguments)
    machine, limits = str(Machine.this()), Limits()
    print(machine)
    for name in asked.names or BENCHMARKS:
        print(f"\n{name}", flush=True)
        found = list(BENCHMARKS[name](limits))
        print(table(found), flush=True)
        save(asked.output, machine, {name: found})


if __name__ == "__main__":
    main()
