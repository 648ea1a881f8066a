"""Tiny checkpoints, made once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny(arch) is the directory of a float32 checkpoint."""
    return cache(lambda arch: make_tiny(arch, tmp_path_factory.mktemp("models") / arch))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are too small to share."""
    torch.set_num_threads(1)
