"""A process that has imported what ranks and router need, and forks itself for every worker that a private Ray starts (Linux).

Importing torch and the rest of a rank takes almost two CPU seconds; here all processes of a cluster share these, which begin with the
command, and the memory. Nothing of it may have started a thread before the fork: `main` looks.
`python -m cluster.nursery HOME`; spoken to by worker_start.py over a socket in HOME. Knows processes; of what it imports only names.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.fate import die_with_parent
from cluster.worker_start import HEADER_BYTES, become, socket_path

# Not Ray: it reads, when it is imported, what a worker's environment says of its job.
PRELOADED = ("ranks.node", "ranks.host", "prefill_node.node", "decode_node.node", "router.server")
_REQUEST_S = 10.0


@dataclass(frozen=True, slots=True)
class Birth:
    """What a child is to be: the command line, directory and environment that its starter was given."""

    given: tuple[str, ...]
    directory: str
    environment: dict[str, str]


class Nursery:
    """Forks until its parent's end of standard input closes. State owner: its only thread.

    A child lives no longer than its starter, whose connection stays open, and the starter no longer than the child, whose exit code it
    is told: Ray sees the one, we see the other. When the nursery ends, however it does, the kernel kills its children.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)
        self._starters: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor that tells of the child's end: pid, connection

    def run(self) -> Birth | None:
        """None when it is over; in a child, once for each, what that is to be."""
        while True:
            key, _ = self._selector.select()[0]  # one at a time: what is done about it may end what others are about
            if key.fileobj == sys.stdin.fileno():
                return None
            if key.fileobj is self._listener:
                if (birth := self._accept()) is not None:
                    return birth
            elif key.fd in self._starters:
                self._told(key.fd)
            elif isinstance(key.fileobj, socket.socket):
                self._abandoned(key.fileobj)

    def _accept(self) -> Birth | None:
        connection, _ = self._listener.accept()
        connection.settimeout(_REQUEST_S)
        try:
            birth, files = _receive(connection)
        except (OSError, ValueError, KeyError):
            connection.close()  # whoever that is, it sees that nothing comes of it, and goes on alone
            return None
        pid = os.fork()
        if not pid:
            self._leave_all(connection)
            for standard, file in enumerate(files):
                os.dup2(file, standard)
        else:
            self._remember(pid, connection)
        for file in files:
            os.close(file)
        return None if pid else birth

    def _remember(self, pid: int, connection: socket.socket) -> None:
        ended = os.pidfd_open(pid)
        self._starters[ended] = pid, connection
        self._selector.register(ended, selectors.EVENT_READ)
        self._selector.register(connection, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # it has gone already, which the next look will tell
            connection.sendall(b"%d\n" % pid)

    def _leave_all(self, connection: socket.socket) -> None:
        """In a child: nothing of its parent's is kept open."""
        self._selector.close()
        self._listener.close()
        connection.close()
        for ended, (_, other) in self._starters.items():
            os.close(ended)
            other.close()

    def _told(self, ended: int) -> None:
        """A child has ended: so does its starter."""
        pid, connection = self._starters.pop(ended)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(ended)
        os.close(ended)
        with contextlib.suppress(KeyError):  # it had gone before
            self._selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        connection.close()

    def _abandoned(self, connection: socket.socket) -> None:
        """A starter has ended: so does its child, of which the next look tells."""
        self._selector.unregister(connection)
        for pid, other in self._starters.values():
            if other is connection:
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def nursery(home: Path, modules: Sequence[str] = PRELOADED) -> Iterator[None]:
    """One that runs during the block, for the private Ray in `home`. Where there can be none, every worker imports for itself.

    Call it on the main thread: the kernel ends it with the thread that started it.
    """
    if sys.platform != "linux":
        yield
        return
    command = [sys.executable, "-m", "cluster.nursery", str(home), *modules]
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # numpy's BLAS would start threads when it is imported; nothing of ours uses it
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=alone) as process:
        try:
            yield
        finally:
            process.kill()  # it has nothing to put in order, and would take half a second for it


def _receive(connection: socket.socket) -> tuple[Birth, list[int]]:
    header, files, _, _ = socket.recv_fds(connection, HEADER_BYTES, 3)
    left, parts = int.from_bytes(header, "big"), []
    while left > 0 and (part := connection.recv(left)):
        parts.append(part)
        left -= len(part)
    said = json.loads(b"".join(parts))
    return Birth(tuple(said["given"]), said["directory"], said["environment"]), files


def _prepare(modules: Sequence[str]) -> None:
    """Import, and set what was imported apart: no collector of a child walks through it, which would also copy its pages."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"


def main() -> None:
    """Listen first, import then: who asks early waits."""
    die_with_parent()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(socket_path(Path(sys.argv[1]))))
    listener.listen(128)
    _prepare(sys.argv[2:])
    born = Nursery(listener).run()
    if born is not None:
        die_with_parent()
        os.environ.clear()
        os.environ.update(born.environment)
        os.chdir(born.directory)
        become(born.given)


if __name__ == "__main__":
    main()
