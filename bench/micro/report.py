"""Rows as a table for people and as JSON for whoever compares runs. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.micro.row import Row

Results = Mapping[str, Sequence[Row]]  # by benchmark


def table(rows: Sequence[Row]) -> str:
    """One line per row: what, value and unit, the limit and its name, the ratio of the two."""
    cells = [(row.what, _number(row.value), row.unit, _limit(row), _ratio(row)) for row in rows]
    widths = [max((len(line[column]) for line in cells), default=0) for column in range(5)]
    return "\n".join(
        f"{what:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {limit:<{widths[3]}}  {ratio:>{widths[4]}}".rstrip()
        for what, value, unit, limit, ratio in cells
    )


def save(path: Path, machine: str, results: Results) -> None:
    """Write the results where what was measured earlier, of other benchmarks, stays. Raises OSError, ValueError if it is no JSON."""
    known = json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if path.exists() else {}
    found = {name: {"machine": machine, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]} for name, rows in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmarks": known | found}, indent=1) + "\n", encoding="utf-8")


def _limit(row: Row) -> str:
    return "" if row.limit is None else f"{row.limit_name} {_number(row.limit)}"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
