"""A checkpoint directory: which tensors it holds, in which safetensors files, and slices of them. Knows no model and no quantization."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from baton.errors import ConfigError

SINGLE = "model.safetensors"
_MODELSLIM = "quant_model_weight*.safetensors"  # quant_model_weights, or quant_model_weight_w8a8_dynamic as older ones write
_INDEX_SUFFIX = ".index.json"
INDEX = SINGLE + _INDEX_SUFFIX
_SHOWN = 8  # names in an error message


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor lies in the checkpoint. dtype: by its safetensors name, say "BF16"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a checkpoint directory, by name. Keeps the file open that was read last, until the `with` it is used in ends.

    Raises ConfigError if files are missing or cannot be read.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.model_dir = model_dir
        self._stack = ExitStack()
        self._current: tuple[Path, safe_open] | None = None
        by_file: dict[Path, list[str]] = {}
        for name, path in checkpoint_files(model_dir).items():
            by_file.setdefault(path, []).append(name)
        self.tensors = {name: stored for path, names in sorted(by_file.items()) for name, stored in _headers(path, names)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._current = None
        self._stack.close()

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A slice of a tensor, as stored: a view of the mapped file, only to be copied from.

        It takes no memory of this process until something is copied; the pages behind it are the kernel's to drop.
        """
        path = self.tensors[name].path
        try:
            slices: torch.Tensor = self._opened(path).get_slice(name)[index]  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        return slices

    def _opened(self, path: Path) -> safe_open:
        """One at a time, so that no more than one file is mapped: what goes with a tensor nearly always lies in the same file."""
        if self._current is None or self._current[0] != path:
            self._stack.close()
            self._current = path, self._stack.enter_context(safe_open(path, framework="pt"))
        return self._current[1]


def checkpoint_files(model_dir: Path | str) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file. Raises ConfigError if the checkpoint has neither or lacks a shard.

    Files are model.safetensors[.index.json], or quant_model_weight*.safetensors[.index.json] as modelslim names them.
    """
    folder = Path(model_dir)
    for pattern in (SINGLE, _MODELSLIM):
        if indices := sorted(folder.glob(pattern + _INDEX_SUFFIX)):
            return _indexed(_only(indices))
        if singles := sorted(folder.glob(pattern)):
            single = _only(singles)
            return dict.fromkeys(_names(single), single)
    raise ConfigError(f"{folder} holds neither {INDEX} nor {SINGLE}: only safetensors checkpoints can be loaded")


def some(names: list[str]) -> str:
    """The first few names, and how many more there are, for an error message."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _only(found: list[Path]) -> Path:
    if len(found) > 1:
        raise ConfigError(f"{found[0].parent} holds {some([path.name for path in found])}, and no index says which belong to the model")
    return found[0]


def _indexed(index: Path) -> dict[str, Path]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} holds no weight_map: {error!r}") from error
    absent = sorted({name for name in weight_map.values() if not (index.parent / name).is_file()})
    if absent:
        raise ConfigError(f"{index} names files that are missing: {some(absent)}")
    return {tensor: index.parent / name for tensor, name in weight_map.items()}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _headers(path: Path, names: list[str]) -> list[tuple[str, Stored]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = [(name, file.get_slice(name)) for name in names]
            return [(name, Stored(path, part.get_dtype(), tuple(part.get_shape()))) for name, part in slices]
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
