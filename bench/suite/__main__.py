"""`python -m bench.suite` (`make bench`): every row beside its peer, results as JSON, tables into docs/performance.md.

Exit codes: 0 measured (targets met or not: the tables say so), 1 a server or load failed, 2 the arguments cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.errors import BatonError, ConfigError
from bench.models import made
from bench.suite.compare import Bench, Peer, compared, peer_of
from bench.suite.experiments import LOADED, bounded, disturbed, generate, scene_of
from bench.suite.facts import facts, write
from bench.suite.render import read, rendered, replaced
from bench.suite.rows import EXPERIMENTS, ROWS, Row
from bench.suite.ruler import Ruler
from cluster.serve import first_signal_interrupts

_ROOT = Path(__file__).resolve().parents[2]
NAMES = (*(row.name for row in ROWS), *EXPERIMENTS)
# Seconds, seen on two cores; only for what is printed before the start.
_BATON_START_S, _PEER_START_S, _LOAD_S, _STREAMS_S = 20, 110, 60, 120


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, render; the exit code."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        if not options.render:
            with first_signal_interrupts():
                _measure(options, console)
        _render(options)
    except BatonError as error:
        print(f"bench.suite: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {', '.join(NAMES)} (all)")
    add("--peer", type=Path, metavar="DIR", help="environment with vLLM, made by bench/peer_vllm.sh DIR; without it Baton runs alone")
    add("--ruler", choices=("vllm", "baton"), help="load generator for both sides (default: the peer's, else ours)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds of every row (3)")
    add("--scale", type=float, default=1.0, metavar="X", help="share of each row's prompts, to try something out (1)")
    add(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "baton-bench-models", metavar="DIR", help="where checkpoints are or go"
    )
    add("--results", type=Path, default=_ROOT / "bench" / "results", metavar="DIR", help="where results go (bench/results)")
    add("--page", type=Path, default=_ROOT / "docs" / "performance.md", metavar="FILE", help="page with the tables (docs/performance.md)")
    add("--render", action="store_true", help="measure nothing: write the tables anew from the results")
    return parser


def _measure(options: argparse.Namespace, console: Console) -> None:
    names = options.rows or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(f"{', '.join(unknown)} is no row; known are {', '.join(NAMES)}")
    if options.peer is not None and not (options.peer / "bin" / "vllm").is_file():
        raise ConfigError(f"--peer {options.peer}: there is no bin/vllm; bench/peer_vllm.sh {options.peer} makes it")
    if options.rounds < 1 or not 0 < options.scale <= 1:
        raise ConfigError("--rounds must be 1 or more, and --scale over 0 and at most 1")
    rows = [row for row in ROWS if row.name in names]
    others = [name for name in EXPERIMENTS if name in names]
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as logs:
        bench = Bench(options.models, options.peer, _ruler(options), options.rounds, Path(logs), _saying(console), options.scale)
        _announce(bench, rows, others)
        for model in dict.fromkeys([*(row.model for row in rows), *([LOADED.model] if others else [])]):
            bench.say(f"checkpoint {made(model, options.models)}")
            _model(bench, options, model, [row for row in rows if row.model == model], others if model == LOADED.model else [])


def _model(bench: Bench, options: argparse.Namespace, model: str, rows: Sequence[Row], others: Sequence[str]) -> None:
    """All that is measured with one checkpoint, so that its peer starts once."""
    with peer_of(bench, model) as peer:
        for row in rows:
            _save(bench, options, row.name, asdict(row), compared(bench, row, peer))
        for name in others:
            _save(
                bench,
                options,
                name,
                asdict(scene_of(bench.scale)) if name == "disaggregation" else asdict(LOADED),
                _experiment(bench, name, peer),
            )


def _experiment(bench: Bench, name: str, peer: Peer | None) -> list[dict[str, Any]]:
    if name == "disaggregation":
        return disturbed(bench, peer)
    return generate(bench) if name == "transformers" else bounded(bench)


def _save(bench: Bench, options: argparse.Namespace, name: str, asked: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """Every row as soon as it is done: what comes after may be interrupted."""
    ruler = "baton bench serve" if name == "disaggregation" else bench.ruler.name
    found = {"row": asked, **facts(bench.peer), "ruler": ruler, "scale": bench.scale, "rounds": rounds}
    write(options.results / f"{name}.json", found)


def _ruler(options: argparse.Namespace) -> Ruler:
    if options.ruler == "vllm" and options.peer is None:
        raise ConfigError("--ruler vllm is the peer's load generator: say where the peer is, --peer DIR")
    return Ruler.of_peer(options.peer) if options.peer is not None and options.ruler != "baton" else Ruler.ours()


def _announce(bench: Bench, rows: Sequence[Row], others: Sequence[str]) -> None:
    """What will happen and how long it may take."""
    if bench.peer is None:
        bench.say("no --peer: Baton alone, without ratios (bench/peer_vllm.sh DIR sets the peer up)")
    sides, num_models = (1 if bench.peer is None else 2), len({row.model for row in rows})
    seconds = bench.rounds * len(rows) * (_BATON_START_S + sides * _LOAD_S) + (sides - 1) * num_models * _PEER_START_S
    seconds += bench.rounds * sum((sides + 1) * _STREAMS_S if name == "disaggregation" else 2 * _LOAD_S for name in others)
    bench.say(f"{len(rows) + len(others)} rows, {bench.rounds} rounds each, load by {bench.ruler.name}: about {seconds / 60:.0f} minutes")


def _saying(console: Console) -> Any:
    began_s = time.monotonic()
    return lambda line: console.print(f"[{time.monotonic() - began_s:6.0f} s] {line}", highlight=False, markup=False, soft_wrap=True)


def _render(options: argparse.Namespace) -> None:
    """Write the tables of all results there are. Raises ConfigError if the page cannot be read."""
    try:
        page = options.page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--page {options.page} cannot be read: {error}") from error
    options.page.write_text(replaced(page, rendered(read(options.results, NAMES))), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
