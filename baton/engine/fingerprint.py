"""What tells one checkpoint from another, without reading all of it. Knows files, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from baton.engine.config_json import read_config

_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_WINDOW_BYTES = 1 << 20
_WINDOWS = 16  # per file, the last one at its end
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def fingerprint(model_dir: Path | str) -> str:
    """What tells one checkpoint from another, in hex: equal on all hosts that hold the same files, wherever they lie.

    SHA-256 over configuration, tokenizer, and of every safetensors file its name, size, header and up to 16 windows of 1 MiB.
    Raises ConfigError if the directory holds no configuration.
    """
    folder = Path(model_dir)
    read_config(folder)
    digest = hashlib.sha256()
    for path in [folder / name for name in _TEXTS if (folder / name).is_file()]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for window in _windows(path):
            digest.update(window)
    return digest.hexdigest()


def _windows(path: Path) -> Iterator[bytes]:
    """The safetensors header (8 bytes of length, then JSON), then windows evenly spread from start to end; all of a small file."""
    last = max(0, path.stat().st_size - _WINDOW_BYTES)
    count = min(_WINDOWS, -(-last // _WINDOW_BYTES) + 1)
    with path.open("rb") as file:
        yield file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES))
        for window in range(count):
            file.seek(window * last // max(1, count - 1))
            yield file.read(_WINDOW_BYTES)
