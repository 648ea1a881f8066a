"""What a program leaves behind: processes, listening sockets, files. Tests start it in a temporary directory of its own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil


class Footprint:
    """Everything seen of one process tree. `see` while it runs, `assert_gone` after it."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self._seen: dict[int, psutil.Process] = {}

    def see(self, pid: int) -> list[psutil.Process]:
        """Note `pid` and everything below it; what is new."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)
        return list(self._seen.values())

    def forget(self, pid: int) -> None:
        """`pid` itself is meant to live on."""
        self._seen.pop(pid, None)

    def alive(self) -> list[str]:
        """Processes seen that still run (a zombie's parent is not ours to blame)."""
        running = [process for process in self._seen.values() if process.is_running()]
        return [line for process in running if (line := _describe(process))]

    def assert_dead(self, within_s: float = 20.0) -> None:
        """Nothing seen is alive."""
        assert len(self._seen) > 1, "nothing was seen"
        psutil.wait_procs(list(self._seen.values()), timeout=within_s)
        assert not self.alive()

    def assert_gone(self, within_s: float = 20.0) -> None:
        """Nothing seen is alive, and the temporary directory is empty."""
        self.assert_dead(within_s)
        assert not self.files()

    def files(self) -> list[str]:
        """What lies in the temporary directory."""
        return sorted(path.name for path in self.tmp.iterdir())


@contextlib.contextmanager
def short_tmp() -> Iterator[Path]:
    """A temporary directory with a short path (pytest's are too long for Unix sockets); removed afterwards, whatever is left in it."""
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _describe(process: psutil.Process) -> str:
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return ""
