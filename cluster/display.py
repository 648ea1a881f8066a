"""What a launch looks like in a terminal: a bar per rank while weights load, plain lines where nobody can see bars.

Knows: stages and progress as values. Does not know: where they come from.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from cluster import messages


class LaunchDisplay:
    """Call it with every Stage and Progress of one launch, inside a `with` block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[said]}", style="dim"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._stage: TaskID | None = None
        self._ranks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}

    def __call__(self, event: messages.Stage | messages.Progress) -> None:
        """Show one event."""
        if isinstance(event, messages.Stage):
            self._enter(event.stage)
        else:
            self._progress(event)

    def _enter(self, stage: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{stage} ...", highlight=False)
        if self._stage is not None:
            self._bars.update(self._stage, completed=1, total=1)
            self._bars.stop_task(self._stage)
        self._stage = self._bars.add_task(stage, total=None, said="")

    def _progress(self, event: messages.Progress) -> None:
        name = f"{event.node}/{event.rank}"
        if name not in self._ranks:
            self._ranks[name] = self._bars.add_task(f"  {name}", total=None, said="")
        total = event.total_bytes or None
        self._bars.update(self._ranks[name], completed=event.done_bytes, total=total, said=event.stage)
        if not self._console.is_terminal and self._said.get(name) != event.stage:
            self._console.print(f"  {name}: {event.stage}", highlight=False)
        self._said[name] = event.stage

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.__exit__(kind, error, trace)
