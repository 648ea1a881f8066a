"""From a checkpoint to the parameters of one rank: plain, turned back from fp8 or int8, or quantized on the way. Which slice goes
where, layers say.

How a tensor `X.weight` is stored is read from the checkpoint itself: plain floats (F64, F32, BF16, F16); F8_E4M3 with
`X.weight_scale_inv`, one scale per block of 128 x 128 (DeepSeek-V3); I8 with `X.weight_scale`, one per row (compressed-tensors,
modelslim). docs/quantization.md describes them. A rank reads only its own slices, and converts a few rows at a time: the peak is its
shard and a few MiB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.engine.checkpoint import Checkpoint, checkpoint_files, some
from baton.engine.devices import Matrix
from baton.engine.quantize import FP8_BLOCK, dequantize_blocks, dequantize_rows, quantize_rows
from baton.errors import ConfigError

__all__ = ["Piece", "Progress", "checkpoint_files", "load"]

Progress = Callable[[int, int], None]
_OFFSETS = ("_offset", "_zero_point")  # modelslim's word, compressed-tensors'
_COMPANIONS: dict[str, tuple[str, ...]] = {  # what may follow a tensor's name, by its dtype; the first of them must be there
    "F64": (),
    "F32": (),
    "BF16": (),
    "F16": (),
    "F8_E4M3": ("_scale_inv",),
    "I8": ("_scale", *_OFFSETS),
}
_ALL_COMPANIONS = {companion for companions in _COMPANIONS.values() for companion in companions}
_STATIC = (".input_scale", ".input_offset", ".input_zero_point", ".deq_scale", ".quant_bias")  # of activations quantized with fixed scales
_FUSED_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
_RUN = 1 << 17  # elements converted at a time: few enough to stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One read: `index` of the checkpoint's tensor `name` fills `target`, converted to its dtype. shape: of the whole tensor.

    scales: [rows] where the target is int8 [rows, columns], filled with it. Where the checkpoint has no int8 they are those of what
    this piece reads: for a slice of columns finer than they would be for the whole row. A tensor of which this rank holds nothing is
    named too, with an empty target: so a checkpoint is checked as a whole.
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

    @property
    def nbytes(self) -> int:
        """Bytes that it fills."""
        return self.target.nbytes + (0 if self.scales is None else self.scales.nbytes)


def load(model_dir: Path | str, pieces: Iterable[Piece], spare: Collection[str] = (), progress: Progress | None = None) -> int:
    """Fill all pieces from the checkpoint; returns the bytes filled.

    spare: names that may be there and are not needed; one that ends with a dot spares all names that begin with it.
    progress(done_bytes, total_bytes) is called after every piece; it must be cheap. Raises ConfigError naming tensors that are
    missing, unexpected, misshapen, unreadable or stored in a way that Baton does not know.
    """
    wanted = list(pieces)
    with Checkpoint(model_dir) as checkpoint:
        _check_names(checkpoint, {piece.name for piece in wanted}, spare)
        for piece in wanted:
            _check_stored(checkpoint, piece)
        done, total = 0, sum(piece.nbytes for piece in wanted)
        for piece in _by_file(checkpoint, wanted):
            _fill(checkpoint, piece)
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
    return done


def _by_file(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> Iterator[Piece]:
    by_file: dict[Path, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_file[checkpoint.tensors[piece.name].path].append(piece)
    for _, of_file in sorted(by_file.items()):
        yield from of_file


def _fill(checkpoint: Checkpoint, piece: Piece) -> None:
    if not piece.target.numel():
        return
    stored = checkpoint.read(piece.name, piece.index)
    scales = _scales(checkpoint, piece)
    if scales is None and piece.scales is None:
        piece.target.copy_(stored)
    elif stored.dtype == torch.int8 and piece.scales is not None:
        assert scales is not None
        piece.target.copy_(stored)
        piece.scales.copy_(scales.view(-1))
    else:
        _convert(piece, stored, scales)


def _convert(piece: Piece, stored: torch.Tensor, scales: torch.Tensor | None) -> None:
    """By way of float32, a few rows at a time."""
    first_row, first_column = (part.indices(size)[0] for part, size in zip(piece.index, piece.shape, strict=True))
    step = max(1, _RUN // stored.shape[1])
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        wide = stored[rows]
        if scales is not None and stored.dtype == torch.int8:
            wide = dequantize_rows(wide, scales[rows])
        elif scales is not None:
            wide = dequantize_blocks(wide, scales, first_row + start, first_column)
        _put(piece, rows, wide)


def _put(piece: Piece, rows: slice, wide: torch.Tensor) -> None:
    if piece.scales is None:
        piece.target[rows].copy_(wide)
    else:
        values, scales = quantize_rows(wide)
        piece.target[rows].copy_(values)
        piece.scales[rows].copy_(scales.view(-1))


def _scales(checkpoint: Checkpoint, piece: Piece) -> torch.Tensor | None:
    """float32: [rows of the piece, 1] beside int8, those of all blocks beside fp8, None beside plain floats."""
    dtype = checkpoint.tensors[piece.name].dtype
    if not _COMPANIONS[dtype]:
        return None
    name, rows = piece.name + _COMPANIONS[dtype][0], piece.index[:1]
    if dtype != "I8":
        return checkpoint.read(name, (slice(None), slice(None))).float()
    for offset in (piece.name + suffix for suffix in _OFFSETS):
        if offset in checkpoint.tensors and bool(checkpoint.read(offset, rows).any()):
            raise ConfigError(f"{checkpoint.model_dir}: {offset} is not zero; int8 weights must be symmetric")
    return checkpoint.read(name, rows).float().view(-1, 1)


def _check_stored(checkpoint: Checkpoint, piece: Piece) -> None:
    stored = checkpoint.tensors[piece.name]
    if stored.shape != piece.shape:
        raise ConfigError(f"{stored.path}: {piece.name} has shape {list(stored.shape)}, config.json asks for {list(piece.shape)}")
    companions = _COMPANIONS.get(stored.dtype)
    if companions is None or (companions and len(stored.shape) != 2):
        raise ConfigError(
            f"{stored.path}: {piece.name} has dtype {stored.dtype}; known are {', '.join(_COMPANIONS)}, the last two of matrices"
        )
    surplus = [name for name in (piece.name + other for other in _ALL_COMPANIONS.difference(companions)) if name in checkpoint.tensors]
    if surplus:
        raise ConfigError(f"{stored.path}: {piece.name} has dtype {stored.dtype} and yet a companion {some(sorted(surplus))}")
    if companions:
        _check_scales(checkpoint, piece, piece.name + companions[0])


def _check_scales(checkpoint: Checkpoint, piece: Piece, name: str) -> None:
    stored = checkpoint.tensors[piece.name]
    if name not in checkpoint.tensors:
        raise ConfigError(f"{checkpoint.model_dir} lacks {name}, without which {piece.name} (dtype {stored.dtype}) means nothing")
    found, (rows, columns) = checkpoint.tensors[name].shape, piece.shape
    known = [(rows, 1), (rows,)] if stored.dtype == "I8" else [(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))]
    if found not in known:
        kind = "one per row" if stored.dtype == "I8" else f"one per block of {FP8_BLOCK} x {FP8_BLOCK}"
        raise ConfigError(f"{stored.path}: {name} has shape {list(found)}, known is {list(known[0])}: {kind} of {piece.name}")


def _check_names(checkpoint: Checkpoint, wanted: set[str], spare: Collection[str]) -> None:
    model_dir, found = checkpoint.model_dir, set(checkpoint.tensors)
    missing = sorted(wanted - found)
    if fused := sorted(name for name in found - wanted if name.endswith(_FUSED_EXPERTS)):
        raise ConfigError(
            f"{model_dir} holds all experts of a layer in one tensor ({some(fused)}); "
            "save it with one per expert, as transformers does unless told save_original_format=False"
        )
    if missing:
        raise ConfigError(f"{model_dir} lacks {len(missing)} tensors that config.json asks for: {some(missing)}")
    named = wanted.union(spare)
    expected = named.union(name + companion for name in named for companion in _ALL_COMPANIONS)
    spared = tuple(name for name in spare if name.endswith("."))
    unexpected = sorted(name for name in found - expected if not name.startswith(spared) and not name.endswith("rotary_emb.inv_freq"))
    static = [name for name in unexpected if name.endswith(_STATIC)]
    if static:
        raise ConfigError(f"{model_dir} was made for activations with static scales; here they are dynamic, one per token: {some(static)}")
    if unexpected:
        raise ConfigError(f"{model_dir} holds {len(unexpected)} tensors that config.json does not ask for: {some(unexpected)}")
