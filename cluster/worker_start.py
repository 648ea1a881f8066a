"""The program by which a private Ray starts its worker processes: has the nursery fork one, or becomes one itself.

Ray's own way takes two processes: one imports all of Ray to read a description of the environment, nearly always an empty one, and
then starts Python again. Where the description is not empty, it is left to Ray.
Knows the form of that command line (ray/_private/workers/setup_worker.py). Does not know: what a worker does. It imports nothing but what
it needs at once, since it runs for every process of a cluster.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.fate import die_with_parent

HEADER_BYTES = 8
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
_HOME = "--temp-dir="
_RAYS_OWN = "setup_worker.py"
_BIRTH_S = 60.0


def socket_path(home: Path) -> Path:
    """Where the nursery of a private Ray listens."""
    return home / "nursery"


def is_described(given: Sequence[str]) -> bool:
    """Whether the worker is to have an environment of its own making."""
    return any(item.startswith(_CONTEXT) and item != _CONTEXT + "{}" for item in given)


def program_and_arguments(given: Sequence[str]) -> tuple[str, list[str]]:
    """What to run: the worker that is the first of `given` which is no option, and its arguments; or Ray's own start of it."""
    worker = next(item for item in given if not item.startswith("-"))
    if is_described(given):
        return os.path.join(os.path.dirname(worker), _RAYS_OWN), list(given)
    return worker, [item for item in given[given.index(worker) + 1 :] if not item.startswith((_CONTEXT, _LANGUAGE))]


def become(given: Sequence[str]) -> None:
    """Be the worker, to its end. As if Python had been started with its path: the directory of this file is not to be imported from."""
    import runpy

    program, arguments = program_and_arguments(given)
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


def born(given: Sequence[str]) -> int | None:
    """Have it forked, and wait for its end without a deadline: it lives as long as it lives. Its exit code; None: there is no nursery."""
    import json
    import socket

    home = next((item.removeprefix(_HOME) for item in given if item.startswith(_HOME)), "")
    request = json.dumps({"given": given, "directory": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, connection.makefile("rb") as lines:
        try:
            connection.settimeout(_BIRTH_S)
            connection.connect(str(socket_path(Path(home))))
            socket.send_fds(connection, [len(request).to_bytes(HEADER_BYTES, "big")], [0, 1, 2])
            connection.sendall(request)
            if not lines.readline():
                return None
        except OSError:  # nobody listens there, or does not any more
            return None
        connection.settimeout(None)
        return int(lines.readline() or b"1")  # nothing: the nursery has ended, and with it the worker


def main() -> int:
    """See above; the exit code, if the worker was not this process. Whoever waits here ends with Ray."""
    die_with_parent()
    code = None if is_described(sys.argv[1:]) else born(sys.argv[1:])
    if code is None:
        become(sys.argv[1:])
        return 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
