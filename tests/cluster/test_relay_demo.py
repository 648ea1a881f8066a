"""`make demo` runs, and every one of its own checks holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.demo import MODEL, demo_config


def test_the_demo_is_the_full_shape() -> None:
    config = demo_config()
    assert (config.prefill.tp, config.decode.dp, config.num_ranks) == (2, 2, 4)
    assert (config.router.http_port, config.router.grpc_port) == (0, 0)


@pytest.mark.demo
@pytest.mark.timeout(300)
def test_the_demo_succeeds() -> None:
    assert MODEL.is_dir()
    done = subprocess.run([sys.executable, "-m", "cluster.demo"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    assert done.stdout.count("✓") >= 6
