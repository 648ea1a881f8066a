"""`baton fingerprint`: the number by which nodes compare their checkpoints, on standard output.

Knows: what people want to see while files are read. Does not know: how a fingerprint is made.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from baton.engine.fingerprint import fingerprint
from baton.errors import ConfigError


def print_fingerprint(model: str, *, full: bool) -> int:
    """Print one line of hex; returns 0. A bar on a terminal shows how far it is. Raises ConfigError for what cannot be read."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("reading", total=None)
            found = fingerprint(Path(model), full, lambda done, total: bar.update(task, completed=done, total=total))
    except OSError as error:
        raise ConfigError(f"{error.filename or model} cannot be read: {error.strerror}") from error
    print(found)
    return 0
