"""A tiny model and a place for a cluster's files, for the tests that start one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.footprint import short_tmp
from tests.tiny_models import make_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("model") / "tiny-qwen3")


@pytest.fixture
def tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this process and those it starts put temporary files."""
    with short_tmp() as path:
        monkeypatch.setattr("tempfile.tempdir", str(path))
        monkeypatch.setenv("TMPDIR", str(path))
        yield path
