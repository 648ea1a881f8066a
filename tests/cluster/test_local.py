"""A private Ray: its files are private, its ports on loopback, two at once do not meet, and nothing of it is left."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from baton.errors import ConfigError
from cluster.local import connect_environment, environment, import_environment, last_lines, make_home, remove_home
from tests.cluster.footprint import Footprint, short_tmp

# Starts a private Ray with one actor, prints the address, and ends when its standard input does.
PROGRAM = """if True:
    import os, sys
    from pathlib import Path
    from cluster.local import private_ray

    class Where:
        def pid(self):
            return os.getpid(), os.nice(0)

    with private_ray(Path(sys.argv[1]), 3):
        import ray
        actor = ray.remote(Where).options(num_cpus=0, resources={"baton_rank": 1}).remote()
        print(*ray.get(actor.pid.remote()), ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()
"""


def start(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(home)]
    return subprocess.Popen(
        command,
        env=environment(home, dict(os.environ)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_a_home_is_private_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_tmp() as tmp:
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        home = make_home()
        assert home.parent == tmp
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE((home / "token").stat().st_mode) == 0o600
        assert (home / "token").read_text() != (make_home() / "token").read_text()
        remove_home(home)
        remove_home(home)
        assert not home.exists()


def test_a_long_temporary_directory_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    try:
        home = make_home()
    except ConfigError:
        assert not os.access("/tmp", os.W_OK)
    else:
        assert home.parent == Path("/tmp")
        remove_home(home)


def test_the_callers_ray_settings_stay_outside() -> None:
    inside = environment(Path("/h"), {"RAY_ADDRESS": "other:1", "RAY_AUTH_TOKEN": "secret", "PATH": "/bin", "OMP_NUM_THREADS": "64"})
    assert inside["RAY_AUTH_MODE"] == "token"
    assert inside["RAY_AUTH_TOKEN_PATH"] == "/h/token"
    assert inside["PATH"] == "/bin"
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "OMP_NUM_THREADS"} & set(inside)


def test_workers_can_import_a_checkout() -> None:
    root = str(Path(__file__).resolve().parents[2])
    assert import_environment({"PYTHONPATH": f"/a:{root}"}) == {"PYTHONPATH": f"{root}:/a"}


def test_the_authentication_mode_of_an_existing_ray_is_explicit(tmp_path: Path) -> None:
    assert "RAY_AUTH_MODE" not in connect_environment({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t"})
    assert connect_environment({"RAY_AUTH_TOKEN": "t"})["RAY_AUTH_MODE"] == "token"
    assert connect_environment({"HOME": str(tmp_path)})["RAY_AUTH_MODE"] == "disabled"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert connect_environment({"HOME": str(tmp_path)})["RAY_AUTH_MODE"] == "token"


def test_the_last_lines_of_a_rank_are_found(tmp_path: Path) -> None:
    logs = tmp_path / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-ab-01000000-77.err").write_text(":job_id:01\n:actor_name:Rank\n" + "".join(f"line {i}\n" for i in range(50)))
    assert last_lines(tmp_path, 77, 2) == "line 48\nline 49"
    assert last_lines(tmp_path, 7) == ""
    assert last_lines(tmp_path, None) == ""


@pytest.mark.relay
def test_two_private_rays_live_side_by_side_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shm_before = set(os.listdir("/dev/shm"))
    with short_tmp() as tmp:
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        homes = [make_home(), make_home()]
        footprint = Footprint(tmp)
        started = [start(home) for home in homes]
        addresses = []
        for process in started:
            assert process.stdout is not None
            pid, nice, address = process.stdout.readline().split()
            assert nice == "0", "Ray would make its actors nice"
            addresses.append(address)
            assert int(pid) in {seen.pid for seen in footprint.see(process.pid)}
            assert not exposed(process.pid)
        assert addresses[0] != addresses[1]
        assert_needs_token(addresses[0])
        for process in started:
            process.communicate(timeout=60)
            assert process.returncode == 0
        for home in homes:
            remove_home(home)
        footprint.assert_gone()
    assert set(os.listdir("/dev/shm")) <= shm_before


def exposed(pid: int) -> list[str]:
    """Listening sockets of a process tree that other machines could reach."""
    found = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.removeprefix("::ffff:").startswith("127."):
                found.append(f"{process.name()} {connection.laddr}")
    return found


def assert_needs_token(address: str) -> None:
    program = f"import ray; ray.init(address={address!r}, configure_logging=False); print('got in')"
    environ = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with pytest.raises((subprocess.TimeoutExpired, subprocess.CalledProcessError)) as kept_out:  # Ray tries again and again
        subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, timeout=6, check=True)
    assert isinstance(kept_out.value, subprocess.TimeoutExpired | subprocess.CalledProcessError)
    assert b"InvalidAuthToken" in (kept_out.value.stderr or b"")
    assert b"got in" not in (kept_out.value.stdout or b"")
