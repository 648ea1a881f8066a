"""One step's work as plain arrays: what the scheduler decides and every rank of a tensor-parallel group executes.

Shapes: T tokens computed in this step, S sequences, M the longest block table, N sampled rows, B new blocks.
A batch packs into one int64 vector, so that a leader can broadcast it to its followers without pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to sample the token that follows a sequence's last computed one. banned_ids cannot be drawn (min_tokens)."""

    seed: int
    output_index: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    num_logprobs: int | None = None
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: compute `token_ids` at positions start, start + 1, …; sample after them or not.

    block_ids: the sequence's block table, covering at least start + len(token_ids) slots.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    sample: SampleRow | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arrays of one step. Everything a rank needs and nothing else; never changed after it was built."""

    token_ids: Int32  # [T]
    positions: Int32  # [T]
    query_starts: Int32  # [S + 1], rows of sequence s are query_starts[s]:query_starts[s + 1]
    context_lens: Int32  # [S], tokens in cache after this step
    block_tables: Int32  # [S, M], padded with 0
    sample_rows: Int32  # [N], index into the T rows whose logits are sampled
    seeds: UInt64  # [N]
    output_indices: Int64  # [N]
    temperatures: Float32  # [N]
    top_ks: Int32  # [N], 0 is off
    top_ps: Float32  # [N]
    min_ps: Float32  # [N]
    num_logprobs: Int32  # [N], -1 is none
    banned_starts: Int32  # [N + 1]
    banned_ids: Int32  # [sum]
    new_blocks: Int32  # [B], blocks that get a new content from this step on
    new_generations: UInt64  # [B]

    @property
    def num_tokens(self) -> int:
        """T, the tokens computed in this step."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """S, the sequences that take part."""
        return len(self.context_lens)

    @classmethod
    def build(cls, rows: Sequence[Row], new_blocks: Sequence[tuple[int, int]] = ()) -> Batch:
        """Lay out rows as arrays. new_blocks: (block id, generation) pairs to stamp before the step writes."""
        if not rows and not new_blocks:
            return _EMPTY
        return cls._laid_out(rows, new_blocks)

    @classmethod
    def _laid_out(cls, rows: Sequence[Row], new_blocks: Sequence[tuple[int, int]]) -> Batch:
        lens = np.array([len(row.token_ids) for row in rows], np.int32)
        firsts = np.array([row.start for row in rows], np.int32)
        starts = starts_of(lens)
        samples = [row.sample for row in rows if row.sample]
        return cls(
            token_ids=_flat([row.token_ids for row in rows]),
            positions=np.arange(starts[-1], dtype=np.int32) + np.repeat(firsts - starts[:-1], lens),
            query_starts=starts,
            context_lens=firsts + lens,
            block_tables=_padded([row.block_ids for row in rows]),
            sample_rows=starts[1:][[row.sample is not None for row in rows]] - np.int32(1) if samples else np.zeros(0, np.int32),
            seeds=np.array([sample.seed for sample in samples], np.uint64),
            output_indices=np.array([sample.output_index for sample in samples], np.int64),
            temperatures=np.array([sample.temperature for sample in samples], np.float32),
            top_ks=np.array([sample.top_k for sample in samples], np.int32),
            top_ps=np.array([sample.top_p for sample in samples], np.float32),
            min_ps=np.array([sample.min_p for sample in samples], np.float32),
            num_logprobs=np.array([-1 if s.num_logprobs is None else s.num_logprobs for s in samples], np.int32),
            banned_starts=starts_of([len(sample.banned_ids) for sample in samples]),
            banned_ids=_flat([sample.banned_ids for sample in samples]),
            new_blocks=np.array([block for block, _ in new_blocks], np.int32),
            new_generations=np.array([generation for _, generation in new_blocks], np.uint64),
        )

    def followed_by(self, other: Batch) -> Batch:
        """The rows of this batch and then those of another one, as one step."""
        tables = np.zeros(
            (self.num_sequences + other.num_sequences, max(self.block_tables.shape[1], other.block_tables.shape[1])), np.int32
        )
        tables[: self.num_sequences, : self.block_tables.shape[1]] = self.block_tables
        tables[self.num_sequences :, : other.block_tables.shape[1]] = other.block_tables
        return Batch(
            token_ids=np.concatenate([self.token_ids, other.token_ids]),
            positions=np.concatenate([self.positions, other.positions]),
            query_starts=_starts_after(self.query_starts, other.query_starts),
            context_lens=np.concatenate([self.context_lens, other.context_lens]),
            block_tables=tables,
            sample_rows=np.concatenate([self.sample_rows, other.sample_rows + np.int32(self.num_tokens)]),
            seeds=np.concatenate([self.seeds, other.seeds]),
            output_indices=np.concatenate([self.output_indices, other.output_indices]),
            temperatures=np.concatenate([self.temperatures, other.temperatures]),
            top_ks=np.concatenate([self.top_ks, other.top_ks]),
            top_ps=np.concatenate([self.top_ps, other.top_ps]),
            min_ps=np.concatenate([self.min_ps, other.min_ps]),
            num_logprobs=np.concatenate([self.num_logprobs, other.num_logprobs]),
            banned_starts=_starts_after(self.banned_starts, other.banned_starts),
            banned_ids=np.concatenate([self.banned_ids, other.banned_ids]),
            new_blocks=np.concatenate([self.new_blocks, other.new_blocks]),
            new_generations=np.concatenate([self.new_generations, other.new_generations]),
        )

    def only(self, rows: Int32) -> Batch:
        """Some of its rows, each as a sequence of its own: a token that sees what it saw, in the same blocks."""
        owners = np.searchsorted(self.query_starts, rows, side="right") - 1
        positions = self.positions[rows]
        count = np.arange(len(positions) + 1, dtype=np.int32)
        return replace(
            self,
            token_ids=self.token_ids[rows],
            positions=positions,
            query_starts=count,
            context_lens=positions + np.int32(1),
            block_tables=self.block_tables[owners],
            sample_rows=count[:-1],
        )

    @property
    def samples_all(self) -> bool:
        """Whether all its rows are sampled, in their order."""
        return len(self.sample_rows) == self.num_tokens and bool((self.sample_rows == np.arange(self.num_tokens)).all())

    def pack(self) -> Int64:
        """The batch as one int64 vector: a length and shape header per array, then its bytes padded to 8."""
        parts: list[Int64] = []
        for array in self._arrays():
            width = array.shape[1] if array.ndim == 2 else -1
            body = np.frombuffer(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0"), np.int64)
            parts += [np.array([array.shape[0], width], np.int64), body]
        return np.concatenate(parts)

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self.token_ids,
            self.positions,
            self.query_starts,
            self.context_lens,
            self.block_tables,
            self.sample_rows,
            self.seeds,
            self.output_indices,
            self.temperatures,
            self.top_ks,
            self.top_ps,
            self.min_ps,
            self.num_logprobs,
            self.banned_starts,
            self.banned_ids,
            self.new_blocks,
            self.new_generations,
        )

    @classmethod
    def unpack(cls, vector: Int64) -> Batch:
        """The inverse of `pack`."""
        arrays: list[NDArray[Any]] = []
        at = 0
        for dtype in _DTYPES:
            length, width = int(vector[at]), int(vector[at + 1])
            count = length * max(width, 1) if width else 0
            words = -(-count * dtype.itemsize // 8)
            flat = vector[at + 2 : at + 2 + words].copy().view(dtype)[:count]  # its own memory, writable as torch wants it
            arrays.append(flat.reshape(length, width) if width >= 0 else flat)
            at += 2 + words
        return cls(*arrays)


_DTYPES = tuple(
    np.dtype(kind) for kind in ("i4", "i4", "i4", "i4", "i4", "i4", "u8", "i8", "f4", "i4", "f4", "f4", "i4", "i4", "i4", "i4", "u8")
)


def starts_of(lens: Sequence[int] | Int32) -> Int32:
    """[n + 1]: where runs of these lengths start when they lie one after the other, and where the last one ends."""
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=starts[1:])
    return starts


def _starts_after(starts: Int32, others: Int32) -> Int32:
    return np.concatenate([starts, others[1:] + starts[-1]])


def _flat(runs: Sequence[Sequence[int]]) -> Int32:
    return np.fromiter(chain.from_iterable(runs), np.int32, sum(map(len, runs)))


def _padded(tables: Sequence[Sequence[int]]) -> Int32:
    width = max((len(table) for table in tables), default=0)
    padded = np.zeros((len(tables), width), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


_EMPTY = Batch._laid_out((), ())


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What a step drew, row by row of `sample_rows`. Only the leader of a tensor-parallel group has any rows.

    top_ids and top_logprobs have K columns, K the largest num_logprobs asked in the batch (0 columns if none).
    failed_rows: nothing could be drawn there, for the logits are NaN or infinite or all tokens are banned; the row's token id is
    a valid one and means nothing.
    """

    token_ids: Int64  # [N]
    logprobs: Float32  # [N], of the unmodified distribution; 0 where not asked
    top_ids: Int64  # [N, K]
    top_logprobs: Float32  # [N, K]
    failed_rows: tuple[int, ...] = ()
