"""What a launch looks like in a terminal: a bar per rank while weights load, plain lines where nobody can see bars, then where time went.

Knows: stages and progress as values. Does not know: where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from baton.deadline import now_s
from cluster import messages

# What people call the stages of a launch once it is over.
_PARTS = {"starting Ray": "Ray", "connecting to Ray": "Ray", "starting": "ranks", "loading": "weights", "proving": "proof"}


def time_line(began_s: float, stages: Sequence[tuple[str, float]], ready_s: float) -> str:
    """How long a launch took, and what of it. stages: what was entered, and when; what has no name of its own counts to what comes next.

    What comes before the first stage is the command itself. Times are seconds on one clock.
    """
    spent, left_s = [("command", stages[0][1] - began_s)] if stages else [], 0.0
    ends = [entered_s for _, entered_s in stages[1:]] + [ready_s]
    for (stage, entered_s), end_s in zip(stages, ends, strict=True):
        left_s += end_s - entered_s
        if stage in _PARTS:
            spent.append((_PARTS[stage], left_s))
            left_s = 0.0
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent)
    return f"ready after {ready_s - began_s:.1f} s ({parts})"


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
        self._stages: list[tuple[str, float]] = []

    def time_line(self, began_s: float) -> str:
        """See the function of this name, for a launch that began at began_s (see now_s) and has ended just now."""
        return time_line(began_s, self._stages, now_s())

    def __call__(self, event: messages.Stage | messages.Progress) -> None:
        """Show one event."""
        if isinstance(event, messages.Stage):
            self._enter(event.stage)
        else:
            self._progress(event)

    def _enter(self, stage: str) -> None:
        self._stages.append((stage, now_s()))
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
