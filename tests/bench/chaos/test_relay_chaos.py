"""Short runs under real faults, of every kind: every promise holds, and nothing of the run stays behind.

Pauses are not judged: whoever runs tests may have other things to do. The deadline of requests is for such a machine, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.chaos.faults import USUAL
from tests.cluster.footprint import Footprint, short_tmp

pytestmark = [pytest.mark.relay, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
_LOOK_S = 0.5


def chaos(capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The report of a run in which every promise held, and of which nothing is left."""
    with short_tmp() as tmp:
        footprint, report = Footprint(tmp), tmp / "report.json"
        command = [sys.executable, "-m", "bench.chaos", "--untimed", "--overlap=0", "--deadline=120", *options, f"--json={report}"]
        with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp)}) as process:
            while process.poll() is None:
                footprint.see(process.pid)
                time.sleep(_LOOK_S)
        said = capfd.readouterr()
        with capfd.disabled():
            print(f"\n{said.err}{said.out}")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        report.unlink()
        footprint.assert_gone()
    assert process.returncode == 0 and found["passed"]
    return found


def test_a_short_run_under_faults(capfd: pytest.CaptureFixture[str]) -> None:
    found = chaos(capfd, "--requests=130", f"--faults={len(USUAL)}", "--burst=16", "--seed=4")
    done = {record["fault"]["kind"]: record["skipped"] for record in found["records"]}
    assert set(done) == set(USUAL)
    assert not [kind for kind, skipped in done.items() if skipped and "cannot be touched here" not in skipped], done
    assert found["findings"]["num_requests"] == 130 + 16


@pytest.mark.slow
def test_a_host_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    found = chaos(capfd, "--requests=60", "--faults=3", "--burst=4", "--kinds=kill", "--raylet")
    assert "raylet" in {record["fault"]["kind"] for record in found["records"]}
