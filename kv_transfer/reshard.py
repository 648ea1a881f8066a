"""Which bytes of a block come from which source rank, for any split of heads and layers on either side. Pure.

A block's smallest unit is a *piece*: one (layer, part, head), contiguous on both sides. A plan names, for every piece of the target,
the one source rank it is read from; pieces that are neighbours on both sides become one run. Layers may be split anywhere, on
either side, and heads split or replicated; a latent (MLA) is one head that all ranks of a tensor-parallel group hold: every source
can serve it, and every target rank reads it for itself, since no rank can compute without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

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


def plan(sources: Sequence[KVLayout], target: KVLayout, earlier: Sequence[KVLayout] = ()) -> tuple[SourceReads, ...]:
    """Where every piece of `target` is read: each exactly once, from a source that owns it.

    earlier: the ranks of the same decode node with smaller numbers. They read the same sources by the same rule, and what the rule gives
    them is counted, so that all ranks of a node load replicas evenly although nobody asks anybody: see `_dealt` for the bound.
    Raises Incompatible if the layouts do not fit.
    """
    check_compatible(sources, target)
    served = [0] * len(sources)
    for other in earlier:
        for share in _dealt(sources, other, served):
            served[share.source] += share.amount
    pieces: dict[int, list[Run]] = defaultdict(list)
    for share in _dealt(sources, target, served):
        pieces[share.source] += share.runs(sources[share.source], target)
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


@dataclass(frozen=True, slots=True)
class _Share:
    """What a target reads from one source: these heads of these layers, all parts of them."""

    source: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def amount(self) -> int:
        """Layers times heads: in these terms all targets of a node are alike, whatever the widths of their parts."""
        return len(self.layers) * len(self.heads)

    def runs(self, source: KVLayout, target: KVLayout) -> Iterator[Run]:
        """Its pieces, not merged yet."""
        for layer, head, part in product(self.layers, self.heads, range(target.num_parts)):
            yield _piece(source, target, layer, part, head)


def _dealt(sources: Sequence[KVLayout], target: KVLayout, served: Sequence[int]) -> Iterator[_Share]:
    """Who serves what of a target. served: pieces dealt to each source before, for other targets.

    k owners of n layers serve n // k consecutive ones each; the n % k that are left over go, one each, to those that have served
    least. So two sources that hold the same serve, over all targets of a node, amounts that differ by one layer of one target at most:
    whoever is ahead never gets more of a group than the other, and whoever gets more gets one layer more.
    """
    dealt = list(served)
    for (owners, heads), layers in _groups(sources, target).items():
        by_need = sorted(owners, key=lambda source: (dealt[source], source))
        for source, mine in zip(by_need, _cut(layers, len(owners)), strict=True):
            dealt[source] += len(mine) * len(heads)
            if mine:
                yield _Share(source, mine, heads)


def _groups(sources: Sequence[KVLayout], target: KVLayout) -> dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]]:
    """(sources that own them all, heads) -> layers of a target. Pieces that nobody owns are in none."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    held = [(source.layers, source.heads) for source in sources]
    for layer in target.layers:
        by_owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for head in target.heads:
            by_owners[tuple(index for index, (layers, heads) in enumerate(held) if layer in layers and head in heads)].append(head)
        by_owners.pop((), None)
        for owners, shared in by_owners.items():
            groups[owners, tuple(shared)].append(layer)
    return groups


def _cut(layers: Sequence[int], num_shares: int) -> Iterator[tuple[int, ...]]:
    """Consecutive shares of equal size, the first ones longer by one where it does not come out even. May be empty."""
    least, longer = divmod(len(layers), num_shares)
    start = 0
    for index in range(num_shares):
        stop = start + least + (index < longer)
        yield tuple(layers[start:stop])
        start = stop


def _piece(source: KVLayout, target: KVLayout, layer: int, part: int, head: int) -> Run:
    return Run(
        source_base=source.offset(0, layer, part, head),
        source_stride=source.stride("block", part),
        target_base=target.offset(0, layer, part, head),
        target_stride=target.stride("block", part),
        nbytes=target.piece_bytes(part),
    )


def _merged(pieces: list[Run]) -> Iterator[Run]:
    """Neighbours as one run. Block 0 speaks for all blocks.

    Pieces of a pair of ranks have the same strides, but for parts of unequal widths with the blocks inside of a part; there, pieces of
    two parts touch only where there is no other block.
    """
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
