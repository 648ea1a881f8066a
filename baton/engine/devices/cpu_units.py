"""How a step's attention is cut into units of work for threads. Pure; no tensors.

How a row's result is added up depends on its own context alone, so nothing here changes it: runs are cut at multiples of RUN_KEYS,
and the kernel adds them in their order whether one thread has taken them all or each another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from baton.engine.batch import Int32, Int64
from baton.engine.devices.cpu_plan import Contexts

# native/attention.h's. A multiple of its TILE.
RUN_KEYS = 512
# Rows that share the packing of a tile of keys: so many that this costs little, so few that their sums stay in the core's cache; and a
# multiple of the kernel's 6 for groups of 1, 2, 3 and 6.
MAX_ROWS = 126
# Of a wider group than this, such as the query heads over one latent, a unit has a part.
_MAX_HEADS = 64
# A sequence with so few tokens in the step has too few rows to occupy all threads, so its context is cut.
_FEW_TOKENS = 8
# What reading and packing a tile of keys takes, in rows.
_ROWS_OF_PACKING = 16


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """items: [n, 9], columns of `struct item` in native/attention.h, the largest first. merges: [m, 5], of `struct merge`.

    partial_rows: rows of partial results per KV head. max_rows: of the largest item. work: about how many rows times keys.
    """

    items: Int32
    merges: Int32
    partial_rows: int
    max_rows: int
    work: int


def units(contexts: Contexts, group: int) -> Units:
    """For `group` query heads per KV head."""
    lens, context_lens = contexts.lens, contexts.context_lens
    starts = np.cumsum(lens) - lens
    if group <= _MAX_HEADS and lens.max(initial=0) * group <= MAX_ROWS and context_lens.max(initial=0) <= RUN_KEYS:
        return _ordered(_one_each(lens, context_lens, starts, group), np.zeros((0, 5), np.int32), 0)
    items, merges, partial_rows = [], [], 0
    for head, num_heads in _head_parts(group):
        of_part, of_merges, partial_rows = _of_heads(lens, context_lens, starts, head, num_heads, partial_rows)
        items.append(of_part)
        merges.append(of_merges)
    return _ordered(np.concatenate(items), np.concatenate(merges), partial_rows)


def _ordered(items: Int64 | Int32, merges: Int64 | Int32, partial_rows: int) -> Units:
    rows = items[:, 2] * items[:, 4]
    costs = (items[:, 6] - items[:, 5]) * (rows + _ROWS_OF_PACKING)
    ordered = items[np.argsort(-costs, kind="stable")].astype(np.int32, copy=False)
    return Units(ordered, merges.astype(np.int32, copy=False), partial_rows, int(rows.max(initial=0)), int(costs.sum()))


def _one_each(lens: Int32, context_lens: Int32, starts: Int32 | Int64, group: int) -> Int32:
    """The items of short contexts with few rows each: what _of_heads gives for them, sooner."""
    items = np.empty((len(lens), 9), np.int32)
    items[:, 0] = np.arange(len(lens))
    items[:, 1], items[:, 2], items[:, 3], items[:, 4] = starts, lens, 0, group
    items[:, 5], items[:, 6], items[:, 7], items[:, 8] = 0, context_lens, context_lens - lens + 1, -1
    return items


def _head_parts(group: int) -> Iterator[tuple[int, int]]:
    """(first head, heads) of parts as equal as can be."""
    num_parts = -(-group // _MAX_HEADS)
    edges = [group * i // num_parts for i in range(num_parts + 1)]
    return ((start, stop - start) for start, stop in pairwise(edges))


def _of_heads(
    lens: Int32, context_lens: Int32, starts: Int32 | Int64, head: int, num_heads: int, partial_rows: int
) -> tuple[Int64, Int64, int]:
    """(items, merges, partial rows so far) of one part of each group. A sequence is cut along its tokens or along its keys."""
    per_tile = max(1, MAX_ROWS // num_heads)
    cut_keys = lens <= min(_FEW_TOKENS, per_tile)
    num_tiles, num_runs = -(-lens // per_tile), np.where(cut_keys, -(-context_lens // RUN_KEYS), 1)
    owner, nth = _expanded(num_tiles * num_runs)
    run, offset = np.where(cut_keys[owner], nth, 0), np.where(cut_keys[owner], 0, nth) * per_tile
    num_tokens = np.minimum(lens[owner] - offset, per_tile)
    first = context_lens[owner] - lens[owner] + offset
    stop = np.where(cut_keys[owner], np.minimum(first + num_tokens, (run + 1) * RUN_KEYS), first + num_tokens)
    rows = np.where(num_runs[owner] > 1, num_tokens * num_heads, 0)
    partial = np.where(rows > 0, partial_rows + np.cumsum(rows) - rows, -1)
    heads = np.full_like(owner, head), np.full_like(owner, num_heads)
    columns = owner, starts[owner] + offset, num_tokens, *heads, run * RUN_KEYS, stop, first + 1, partial
    merges = _merges(lens, num_runs, starts, head, num_heads, partial_rows)
    return np.stack(columns, axis=1), merges, partial_rows + int(rows.sum())


def _merges(lens: Int32, num_runs: Int64, starts: Int32 | Int64, head: int, num_heads: int, partial_rows: int) -> Int64:
    """One for each row of the sequences that are cut into runs."""
    rows = np.where(num_runs > 1, lens * num_heads, 0)
    bases = partial_rows + np.cumsum(rows * num_runs) - rows * num_runs
    owner, nth = _expanded(rows)
    return np.stack((starts[owner] + nth // num_heads, head + nth % num_heads, bases[owner] + nth, num_runs[owner], rows[owner]), axis=1)


def _expanded(counts: Int32 | Int64) -> tuple[Int64, Int64]:
    """For counts[i] things of each i: whose each is, and the how-manieth of those."""
    wide = counts.astype(np.int64)
    owner = np.repeat(np.arange(len(wide)), wide)
    return owner, np.arange(len(owner)) - (np.cumsum(wide) - wide)[owner]
