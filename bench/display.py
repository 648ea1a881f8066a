"""Progress of long measurements on standard error: a bar where somebody watches, a line per stage where nobody does."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.solo import Advance


class Stages:
    """Call it inside a `with` block at the start of each stage; what it returns is told of the progress."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)

    def __call__(self, name: str, total: int) -> Advance:
        """Begin a stage of `total` units."""
        if not self._console.is_terminal:
            self._console.print(f"{name} ...", highlight=False, markup=False)
        task = self._bars.add_task(name, total=total)
        return lambda num_done: self._bars.advance(task, num_done)

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.__exit__(kind, error, trace)
