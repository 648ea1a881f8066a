"""A tiny checkpoint and a text for it, made once per session."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_tiny


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint with experts."""
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "moe", dtype="bfloat16")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(list(pydoc_data.topics.topics.values())[:3]), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are too small to share."""
    torch.set_num_threads(1)
