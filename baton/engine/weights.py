"""From safetensors files to the parameters of one rank. Knows file formats and slices; which slice goes where, layers say.

Every rank reads only its own slices: the peak is its shard plus one slice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baton.engine.devices import Matrix
from baton.errors import ConfigError

Progress = Callable[[int, int], None]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHOWN = 8  # names in an error message


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One read: `index` of the checkpoint's tensor `name` fills `target`, converted to its dtype. shape: of the whole tensor.

    scales: [rows] where the target is int8 [rows, columns], filled with it. A tensor of which this rank holds nothing is named too,
    with an empty target: so a checkpoint is checked as a whole.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    target: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str, shape: tuple[int, int], index: tuple[slice, slice], target: Matrix) -> Piece:
        """The piece that fills a matrix [rows, columns]."""
        return cls(name, shape, index, target.values, target.scales)


def checkpoint_files(model_dir: Path | str) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file. Raises ConfigError if the checkpoint has neither or lacks a shard."""
    folder = Path(model_dir)
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        absent = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if absent:
            raise ConfigError(f"{folder / INDEX} names files that are missing: {_some(absent)}")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    if not (folder / SINGLE).is_file():
        raise ConfigError(f"{folder} holds neither {INDEX} nor {SINGLE}: only safetensors checkpoints can be loaded")
    with _opened(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)  # type: ignore[no-untyped-call]


def load(model_dir: Path | str, pieces: Iterable[Piece], spare: Collection[str] = (), progress: Progress | None = None) -> int:
    """Fill all pieces from the checkpoint; returns the bytes filled. spare: names that may be there and are not needed.

    progress(done_bytes, total_bytes) is called after every piece; it must be cheap. Raises ConfigError naming missing,
    unexpected, misshapen or unreadable tensors.
    """
    files, wanted = checkpoint_files(model_dir), list(pieces)
    _check_names(model_dir, {piece.name for piece in wanted}, set(files), set(spare))
    by_file: dict[Path, list[Piece]] = defaultdict(list)
    for piece in wanted:
        by_file[files[piece.name]].append(piece)
    total = sum(piece.target.nbytes for piece in wanted)
    done = 0
    for path, of_file in sorted(by_file.items()):
        for filled in _fill(path, of_file):
            done += filled
            if progress is not None:
                progress(done, total)
    return done


def _fill(path: Path, pieces: Iterable[Piece]) -> Iterator[int]:
    """Yields the bytes of each piece when it is in place."""
    with _opened(path) as file:
        for piece in pieces:
            source = file.get_slice(piece.name)  # type: ignore[no-untyped-call]
            _check_shape(path, piece, tuple(source.get_shape()))
            if piece.target.numel():
                piece.target.copy_(source[piece.index])
            yield piece.target.nbytes


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _check_shape(path: Path, piece: Piece, found: tuple[int, ...]) -> None:
    if found != piece.shape:
        raise ConfigError(f"{path}: {piece.name} has shape {list(found)}, config.json asks for {list(piece.shape)}")


def _check_names(model_dir: Path | str, wanted: set[str], found: set[str], spare: set[str]) -> None:
    missing = sorted(wanted - found)
    if missing:
        raise ConfigError(f"{model_dir} lacks {len(missing)} tensors that config.json asks for: {_some(missing)}")
    unexpected = sorted(name for name in found - wanted - spare if not name.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise ConfigError(f"{model_dir} holds {len(unexpected)} tensors that config.json does not ask for: {_some(unexpected)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
