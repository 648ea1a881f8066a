"""Tiny tokenizers of both kinds, as checkpoints have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.tokenizer import Tokenizer
from tests.tiny_tokenizers import make_byte_fallback, make_byte_level

MAKERS = {"byte level": make_byte_level, "byte fallback": make_byte_fallback}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory of each kind."""
    return {kind: make(tmp_path_factory.mktemp("tokenizer")) for kind, make in MAKERS.items()}


@pytest.fixture(scope="session")
def loaded(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    """Their tokenizers."""
    return {kind: Tokenizer.load(path) for kind, path in directories.items()}
