"""A Ray of our own on this machine: no fixed port or path, loopback only, a token per cluster, gone without trace.

Knows: Ray's options. Does not know: what will run on it. Ray reads its authentication mode once, when it is imported, and takes over
SIGTERM; so a private Ray lives in a process of its own (keeper.py), started with `environment`, and never in a user's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import site
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from baton.errors import ConfigError, Unavailable
from cluster.plan import RANK_RESOURCE
from ranks.cores import SPIN

HOME_PREFIX = "baton-"
NAMESPACE = "baton"
PROBE_S = 5.0
OBJECT_STORE_BYTES = 80 * 2**20
# Unix sockets have at most 107 bytes of path, of which Ray's session directory and socket names take 69.
_MAX_HOME_BYTES = 107 - 69
_TOKEN = "token"
_TMP = "t"


def make_home() -> Path:
    """A new private directory (0700) for one cluster's sockets, logs, token and temporary files. The caller removes it."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) + len(f"/{HOME_PREFIX}12345678") <= _MAX_HOME_BYTES and os.access(parent, os.W_OK):
            home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX, dir=parent))
            (home / _TMP).mkdir()
            _write_token(home / _TOKEN)
            return home
    raise ConfigError(f"no writable directory for temporary files with a path under {_MAX_HOME_BYTES} bytes; set TMPDIR to a short one")


def environment(home: Path, inherited: dict[str, str]) -> dict[str, str]:
    """The environment of a process that will start a private Ray in `home`: none of the caller's RAY_ settings, and these."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("RAY_") and name != "OMP_NUM_THREADS"}
    return {
        **SPIN,
        **kept,
        **import_environment(inherited),
        "TMPDIR": str(home / _TMP),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / _TOKEN),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's name for "this cluster has one host": every port of Ray itself then binds to loopback, on Linux as well (measured on 2.60).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray would run actors at nice 15.
        "RAY_worker_niceness": "0",
        # Memory was planned before the start; Ray's monitor would kill a rank because of what others on the host use.
        "RAY_memory_monitor_refresh_ms": "0",
        # The autoscaler's metrics would take the fixed port 44217.
        "AUTOSCALER_METRIC_PORT": "0",
    }


def import_environment(inherited: dict[str, str]) -> dict[str, str]:
    """What a worker process needs to import Baton: nothing if it is installed, else the directory this checkout is in."""
    root = str(Path(__file__).resolve().parent.parent)
    if root in site.getsitepackages():
        return {}
    others = [path for path in inherited.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    return {"PYTHONPATH": os.pathsep.join([root, *others])}


@contextlib.contextmanager
def private_ray(home: Path, num_ranks: int, *, show_logs: bool = False) -> Iterator[None]:
    """A Ray with room for `num_ranks` ranks, and a connection to it; both end with the block. Blocks for seconds.

    Call it on the main thread of a process started with `environment`: Ray's processes die with the thread that started them.
    """
    import ray  # reads the environment when it is imported

    from cluster.head import Head

    assert os.environ.get("RAY_AUTH_TOKEN_PATH") == str(home / _TOKEN)
    head = Head(
        home,
        slots={RANK_RESOURCE: num_ranks},
        num_workers=num_ranks + 1,  # actors ask for no CPU; Ray keeps as many workers in stock, and starts them while it starts itself
        store=(_plasma_directory(home), OBJECT_STORE_BYTES),
        logs=show_logs,
    )
    try:
        ray.init(address=head.address, namespace=NAMESPACE, log_to_driver=show_logs, configure_logging=False)
        yield
    finally:
        ray.shutdown()
        head.end()


def connect(address: str, *, namespace: str | None = None, show_logs: bool = False) -> None:
    """Connect to an existing Ray cluster. Call it in a process started with `connect_environment`. Raises Unavailable."""
    import ray  # reads the environment when it is imported

    needed = import_environment(dict(os.environ))
    _probe(address)
    _greet(address)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=show_logs,
            configure_logging=False,
            runtime_env={"env_vars": needed} if needed else None,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise Unavailable(f"cannot connect to the Ray cluster at {address}: {error}", stage="ray", cause="no_ray") from error


def _probe(address: str) -> None:
    """Raise Unavailable unless something listens at host:port, where Ray itself would wait for minutes. Others are for Ray to judge."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
    except OSError as error:
        raise Unavailable(f"no Ray cluster answers at {address} within {PROBE_S:g} s: {error}", stage="ray", cause="no_ray") from error


def _greet(address: str) -> None:
    """Raise Unavailable unless a Ray cluster answers at host:port and lets us in. Takes about 3 x PROBE_S where nobody does.

    Ray itself would try for minutes to talk to what listens there and is no Ray, hangs, or wants another token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RayError

    if ":" not in address or "://" in address:
        return  # "auto", or Ray's own client: for Ray to judge
    try:
        GcsClient(address=address).get_all_node_info(timeout=PROBE_S)
    except RayError as error:
        said = " ".join(str(error).split())
        raise Unavailable(f"what listens at {address} is no Ray cluster that lets us in: {said}", stage="ray", cause="no_ray") from error


def connect_environment(inherited: dict[str, str]) -> dict[str, str]:
    """What to add to the environment before Ray is imported to connect to an existing cluster: patience, and its authentication mode.

    The operator's RAY_AUTH_MODE stands; without one, a token that Ray would find means token mode.
    """
    patience = {"RAY_py_gcs_connect_timeout_s": f"{PROBE_S:.0f}"}
    if "RAY_AUTH_MODE" in inherited:
        return patience
    given = "RAY_AUTH_TOKEN" in inherited or "RAY_AUTH_TOKEN_PATH" in inherited
    found = Path(inherited.get("HOME", "/"), ".ray", "auth_token").is_file()
    return {**patience, "RAY_AUTH_MODE": "token" if given or found else "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def remove_home(home: Path) -> None:
    """Remove the directory of a cluster whose processes have ended."""
    if home.exists():
        shutil.rmtree(home)


def last_lines(home: Path, pid: int | None, num_lines: int = 30) -> str:
    """The last lines that the actor process `pid` wrote, from Ray's session logs in `home`; "" if none are known."""
    lines: list[str] = []
    for suffix in ("out", "err"):
        for file in sorted(home.glob(f"session_[0-9]*/logs/worker-*-{pid}.{suffix}")):
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if not line.startswith((":job_id:", ":actor_name:"))][-num_lines:])


def _plasma_directory(home: Path) -> str:
    """Where the object store maps its memory: containers often have 64 MB of /dev/shm, less than Ray's least."""
    shm = "/dev/shm"
    enough = os.path.isdir(shm) and shutil.disk_usage(shm).free > 2 * OBJECT_STORE_BYTES
    return shm if enough else str(home)


def _write_token(path: Path) -> None:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
