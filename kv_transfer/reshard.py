"""Which bytes of a block come from which source rank, for any split of heads and layers on either side. Pure.

A block's smallest unit is a *piece*: one (layer, part, head), contiguous on both sides. A plan names, for every piece of the target,
the one source rank it is read from; pieces that are neighbours on both sides become one run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.transport import Spans


@dataclass(frozen=True, slots=True)
class Run:
    """For a source block s and a target block t: `nbytes` from source_base + s * source_stride to target_base + t * target_stride."""

    source_base: int
    source_stride: int
    target_base: int
    target_stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SourceReads:
    """What one target rank reads of every block from the source rank with index `source`."""

    source: int
    runs: tuple[Run, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes read per block."""
        return sum(run.nbytes for run in self.runs)


def plan(sources: Sequence[KVLayout], target: KVLayout, target_index: int = 0, num_targets: int = 1) -> tuple[SourceReads, ...]:
    """Where every piece of `target` is read: each exactly once, from a source that owns it.

    Where k sources hold the same head, each of them serves a contiguous k-th of the layers, whatever other targets do;
    `target_index` of `num_targets` (over all groups that read these sources) turns the order, so that they do not start at the same one.
    Raises Incompatible if the layouts do not fit.
    """
    assert 0 <= target_index < num_targets
    check_compatible(sources, target)
    pieces: dict[int, list[Run]] = defaultdict(list)
    for layer, head in ((layer, head) for layer in target.layers for head in target.heads):
        source = _choose(sources, target, layer, head, target_index, num_targets)
        pieces[source] += (_piece(sources[source], target, layer, part, head) for part in range(target.num_parts))
    return tuple(SourceReads(source, tuple(_merged(pieces[source]))) for source in sorted(pieces))


def spans(runs: Sequence[Run], source_blocks: Sequence[int], target_blocks: Sequence[int]) -> Spans:
    """The spans that fill `target_blocks[i]` from `source_blocks[i]`, in that order; neighbours on both sides merged."""
    assert len(source_blocks) == len(target_blocks)
    table = np.array([(run.source_base, run.source_stride, run.target_base, run.target_stride, run.nbytes) for run in runs], np.int64)
    table = table.reshape(-1, 5)
    source = table[:, 0] + np.asarray(source_blocks, np.int64).reshape(-1, 1) * table[:, 1]
    target = table[:, 2] + np.asarray(target_blocks, np.int64).reshape(-1, 1) * table[:, 3]
    nbytes = np.broadcast_to(table[:, 4], source.shape)
    return _joined(Spans(source.ravel(), target.ravel(), nbytes.ravel()))


def _choose(sources: Sequence[KVLayout], target: KVLayout, layer: int, head: int, target_index: int, num_targets: int) -> int:
    owners = [index for index, source in enumerate(sources) if source.owns(layer, head)]
    share = (layer - target.layer_start) * len(owners) // target.num_layers
    first = target_index * len(owners) // num_targets
    return owners[(first + share) % len(owners)]


def _piece(source: KVLayout, target: KVLayout, layer: int, part: int, head: int) -> Run:
    return Run(
        source_base=source.offset(0, layer, part, head),
        source_stride=source.stride("block"),
        target_base=target.offset(0, layer, part, head),
        target_stride=target.stride("block"),
        nbytes=target.piece_bytes,
    )


def _merged(pieces: list[Run]) -> Iterator[Run]:
    """Neighbours as one run. Block 0 speaks for all blocks, since the strides are the same for all pieces of a pair of ranks."""
    ordered = sorted(pieces, key=lambda run: run.target_base)
    last = ordered[0]
    for run in ordered[1:]:
        if run.source_base == last.source_base + last.nbytes and run.target_base == last.target_base + last.nbytes:
            last = replace(last, nbytes=last.nbytes + run.nbytes)
        else:
            yield last
            last = run
    yield last


def _joined(parts: Spans) -> Spans:
    """Consecutive spans that touch on both sides as one."""
    if len(parts) < 2:
        return parts
    touches = (np.diff(parts.source) == parts.nbytes[:-1]) & (np.diff(parts.target) == parts.nbytes[:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~touches]))
    return Spans(parts.source[starts], parts.target[starts], np.add.reduceat(parts.nbytes, starts))
