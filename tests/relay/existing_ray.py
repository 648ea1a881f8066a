"""One Ray for many clusters in turn: a private one, in a process of its own, that lives as long as a `with` block.

Most of what a tiny cluster costs is starting Ray and importing torch in its ranks; this way Ray starts once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.local import environment, make_home, remove_home

END_S = 60.0
# Ends when its standard input does: so also when whoever started it is killed.
_PROGRAM = """if True:
    import sys
    from pathlib import Path
    from cluster.local import private_ray
    with private_ray(Path(sys.argv[1]), int(sys.argv[2])):
        import ray
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def existing_ray(num_ranks: int) -> Iterator[str]:
    """The address of a Ray with room for `num_ranks`, for `ray.address`; this process's environment has its token meanwhile."""
    home = make_home()
    given = environment(home, dict(os.environ))
    command = [sys.executable, "-c", _PROGRAM, str(home), str(num_ranks)]
    with subprocess.Popen(command, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "Ray has not started"
        with pytest.MonkeyPatch.context() as patch:
            for name in given.keys() - {"TMPDIR"}:
                patch.setenv(name, given[name])
            yield address
        process.communicate(timeout=END_S)
    remove_home(home)
