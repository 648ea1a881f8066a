"""What tells one checkpoint from another, by samples of its files or all of them. Knows files, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from baton.engine.config_json import read_config
from baton.engine.config_json.quantization import DESCRIPTION

Progress = Callable[[int, int], None]
_TEXTS = (
    *("config.json", DESCRIPTION),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
)
_WINDOW_BYTES = 1 << 20
_WINDOWS = 16  # per file, the last one at its end
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def fingerprint(model_dir: Path | str, full: bool = False, progress: Progress | None = None) -> str:
    """What tells one checkpoint from another, in hex: equal on all hosts that hold the same files, wherever they lie.

    SHA-256 over configuration, tokenizer, and of every safetensors file its name, size, header and up to 16 windows of 1 MiB.
    full: every byte of every safetensors file instead of windows, which is another number and takes as long as reading them.
    progress(done_bytes, total_bytes), of what is read, is called about once per MiB. Raises ConfigError if the directory holds
    no configuration, OSError if a file cannot be read.
    """
    folder = Path(model_dir)
    read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    spans = _everything if full else _windows
    digest = hashlib.sha256(b"full\n" if full else b"")
    done, total = 0, sum(length for path in weights for _, length in spans(path))
    for path in [folder / name for name in _TEXTS if (folder / name).is_file()]:
        digest.update(_title(path) + path.read_bytes())
    for path in weights:
        digest.update(_title(path))
        for content in _read(path, spans(path)):
            digest.update(content)
            done += len(content)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def _title(path: Path) -> bytes:
    return f"{path.name} {path.stat().st_size}\n".encode()


def _everything(path: Path) -> Sequence[tuple[int, int]]:
    """Spans (offset, length) that are the whole file."""
    size = path.stat().st_size
    return [(at, min(_WINDOW_BYTES, size - at)) for at in range(0, size, _WINDOW_BYTES)]


def _windows(path: Path) -> Sequence[tuple[int, int]]:
    """The safetensors header (8 bytes of length, then JSON), then windows evenly spread from start to end; all of a small file."""
    size = path.stat().st_size
    last = max(0, size - _WINDOW_BYTES)
    count = min(_WINDOWS, -(-last // _WINDOW_BYTES) + 1)
    with path.open("rb") as file:
        header = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES, max(0, size - 8))
    return [(8, header), *((window * last // max(1, count - 1), min(_WINDOW_BYTES, size)) for window in range(count))]


def _read(path: Path, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for at, length in spans:
            file.seek(at)
            yield file.read(length)
