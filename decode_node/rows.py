"""The running sequences of a decode group as columns of numpy arrays: one row each, updated in place. Pure.

Knows what a step needs of a sequence that runs, and moves all of them on by one token at once; who runs, and with which blocks, is the
scheduler's to say. Here the cost of a step is a few operations on arrays, however many sequences there are.

A row is made by `join` and given back by `leave`. The others keep their places until `settle`, which moves the last rows into the gaps:
so what was picked for a step holds until the step is done, whatever happens meanwhile. All of it depends on the order of these calls
alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from baton.engine.batch import Batch, Int32, Int64, starts_of
from baton.engine.blocks import blocks_for
from baton.engine.sequence import Sequence
from baton.request import Drawn

Bools = NDArray[np.bool_]

ROW = np.dtype(
    [
        ("token_id", np.int32),  # the last one, which the next step computes
        ("position", np.int32),  # of that token
        ("output_index", np.int64),  # of the token drawn next
        ("num_blocks", np.int32),  # that it has
        ("num_reserved", np.int32),  # promised and not taken
        ("most_blocks", np.int32),  # that it can ever need
        ("stops_from", np.int64),  # its stop ids are banned before this output index, and end it from there on
        ("last_index", np.int64),  # the output index that ends it
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("num_logprobs", np.int32),  # -1: none
        ("wanted", np.bool_),  # False once the sequence is over; a step may still compute the row
    ]
)
FIRST_ROWS = 16
FIRST_BLOCKS = 16
NO_ID = -1  # pads stop ids: no token has it
NO_LOGPROBS = -1  # as in Batch


class Running(Protocol):
    """A sequence that runs, as far as its row goes. row: its place, None if it has none; kept by `Rows`."""

    row: int | None

    @property
    def sequence(self) -> Sequence:
        """Its tokens, blocks and wishes."""


Item = TypeVar("Item", bound=Running)
Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Picked:
    """The rows of one step: all of them, or those of an index [count]."""

    index: slice | Int64
    count: int

    def holds(self, row: int | None) -> bool:
        """Whether this row takes part."""
        return row is not None and (row < self.count if isinstance(self.index, slice) else row in self.index)

    def of(self, items: list[Thing]) -> list[Thing]:
        """What is in these places of a list."""
        return items[self.index] if isinstance(self.index, slice) else [items[row] for row in self.index.tolist()]


NOBODY = Picked(slice(0, 0), 0)


@dataclass(frozen=True, slots=True)
class Moved:
    """What a step's tokens came to, place by place of what was picked.

    output_indices: of the tokens. plain: it is wanted, goes on, and there is nothing to be said beside its token. filled: places
    whose newest block is full now.
    """

    output_indices: Int64
    plain: Bools
    filled: list[int]


class Rows(Generic[Item]):
    """State owner: the scheduler. Memory grows with the most rows and the longest sequence that there were, and is kept."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._data = np.zeros(FIRST_ROWS, ROW)
        self._tables = np.zeros((FIRST_ROWS, FIRST_BLOCKS), np.int32)
        self._stop_ids = np.full((FIRST_ROWS, 0), NO_ID, np.int32)
        self._items: list[Item] = []
        self._request_ids: list[str] = []
        self._attempts: list[int] = []
        self._left: list[int] = []  # rows that nobody has, until `settle`

    @property
    def num_wanted(self) -> int:
        """Sequences that run and are not over."""
        return int(np.count_nonzero(self._now["wanted"]))

    def num_outgrown(self) -> int:
        """How many have taken all that was promised to them, and may need more."""
        now = self._now
        return int(np.count_nonzero(now["wanted"] & (now["num_reserved"] == 0) & (now["num_blocks"] < now["most_blocks"])))

    @property
    def _now(self) -> NDArray[np.void]:
        return self._data[: len(self._items)]

    def join(self, item: Item) -> None:
        """A row for a sequence of which all but the last token are computed."""
        sequence, row = item.sequence, len(self._items)
        self._make_room(row, len(sequence.block_ids), len(sequence.request.sampling.stop_token_ids))
        self._data[row] = _record(sequence, self._block_size)
        self._tables[row, : len(sequence.block_ids)] = sequence.block_ids
        stop_ids = sequence.request.sampling.stop_token_ids
        self._stop_ids[row, : len(stop_ids)] = stop_ids
        item.row = row
        self._items.append(item)
        self._request_ids.append(sequence.request.request_id)
        self._attempts.append(sequence.request.attempt)

    def unwanted(self, item: Item) -> None:
        """Nobody wants its tokens any more, but the step under way computes its row, if it has one: `leave` follows."""
        if item.row is not None:
            self._data["wanted"][item.row] = False

    def leave(self, item: Item) -> None:
        """The sequence runs no longer: its row is given back."""
        assert item.row is not None
        self._data["wanted"][item.row] = False
        self._left.append(item.row)
        item.row = None

    def extend(self, item: Item) -> None:
        """The sequence has taken one more block."""
        assert item.row is not None
        block_ids = item.sequence.block_ids
        self._make_room(item.row, len(block_ids), 0)
        self._tables[item.row, len(block_ids) - 1] = block_ids[-1]
        record = self._data[item.row]
        record["num_blocks"] = len(block_ids)
        record["num_reserved"] = item.sequence.reserved

    def settle(self) -> None:
        """Close the gaps: rows that were picked before mean nothing now."""
        for row in sorted(self._left, reverse=True):
            self._fill(row)
        self._left.clear()

    def without_slot(self) -> list[Item]:
        """Whose last token has no slot in the blocks that it has."""
        now = self._now
        return [self._items[row] for row in np.flatnonzero(now["position"] >= now["num_blocks"] * self._block_size).tolist()]

    def pick(self, left_out: Collection[Item]) -> Picked:
        """Every row but those of some; to be called on settled rows."""
        assert not self._left
        count = len(self._items)
        rows = {item.row for item in left_out if item.row is not None}
        if not rows:
            return Picked(slice(0, count), count)
        index = np.array([row for row in range(count) if row not in rows], np.int64)
        return Picked(index, len(index))

    def batch(self, picked: Picked, new_blocks: list[tuple[int, int]]) -> Batch:
        """One token of each, and the draw of the next one. Nothing that happens here later changes the batch."""
        data = self._data[picked.index]
        banned = self._banned(picked, data)
        each = np.arange(picked.count + 1, dtype=np.int32)
        return Batch(
            token_ids=data["token_id"].copy(),
            positions=data["position"].copy(),
            query_starts=each,
            context_lens=data["position"] + np.int32(1),
            block_tables=self._tables[picked.index, : data["num_blocks"].max(initial=0)].copy(),
            sample_rows=each[:-1].copy(),
            seeds=data["seed"].copy(),
            output_indices=data["output_index"].copy(),
            temperatures=data["temperature"].copy(),
            top_ks=data["top_k"].copy(),
            top_ps=data["top_p"].copy(),
            min_ps=data["min_p"].copy(),
            num_logprobs=data["num_logprobs"].copy(),
            banned_starts=starts_of([len(ids) for ids in banned]) if banned else np.zeros(picked.count + 1, np.int32),
            banned_ids=np.array([token_id for ids in banned for token_id in ids], np.int32),
            new_blocks=np.array([block for block, _ in new_blocks], np.int32),
            new_generations=np.array([generation for _, generation in new_blocks], np.uint64),
        )

    def _banned(self, picked: Picked, data: NDArray[np.void]) -> list[tuple[int, ...]]:
        """What each cannot draw; nothing if that holds for all."""
        early: Bools = data["output_index"] < data["stops_from"]
        if not early.any():
            return []
        sequences = [item.sequence for item in picked.of(self._items)]
        return [one.request.sampling.stop_token_ids if soon else () for one, soon in zip(sequences, early.tolist(), strict=True)]

    def items(self, picked: Picked) -> list[Item]:
        """Whose rows they are."""
        return picked.of(self._items)

    def move(self, picked: Picked, token_ids: Int64, failed: Collection[int]) -> Moved:
        """Each has drawn its next token, [count], but those in the `failed` places; these, those that end here, and those that are not
        wanted must `leave` next."""
        data, index = self._data, picked.index
        before = data[index]
        output_indices: Int64 = before["output_index"].copy()
        ends = output_indices >= before["last_index"]
        if self._stop_ids.shape[1]:
            stops = (self._stop_ids[index] == token_ids[:, None]).any(axis=1)
            ends |= stops & (output_indices >= before["stops_from"])
        plain = before["wanted"] & (before["num_logprobs"] < 0) & ~ends
        positions = before["position"] + np.int32(1)
        filled: Bools = positions % self._block_size == 0
        for place in failed:
            if place < picked.count:
                plain[place] = filled[place] = False
        data["token_id"][index] = token_ids
        data["position"][index] = positions
        data["output_index"][index] = output_indices + 1
        return Moved(output_indices, plain, np.flatnonzero(filled).tolist())

    def drawn(self, picked: Picked, moved: Moved, token_ids: Int64) -> Drawn:
        """The plain ones' tokens."""
        names, attempts = picked.of(self._request_ids), picked.of(self._attempts)
        if moved.plain.all():
            return Drawn(names, attempts, moved.output_indices.tolist(), token_ids.tolist())
        places = np.flatnonzero(moved.plain)
        rows = places.tolist()
        return Drawn(
            [names[row] for row in rows], [attempts[row] for row in rows], moved.output_indices[places].tolist(), token_ids[places].tolist()
        )

    def _fill(self, row: int) -> None:
        """Put the last row in the place of this one, which may be the last itself."""
        last = len(self._items) - 1
        for of_rows in (self._items, self._request_ids, self._attempts):
            _fill_from_end(of_rows, row)
        for columns, empty in ((self._data, 0), (self._tables, 0), (self._stop_ids, NO_ID)):
            columns[row] = columns[last]
            columns[last] = empty
        if row < last:
            self._items[row].row = row

    def _make_room(self, row: int, num_blocks: int, num_stop_ids: int) -> None:
        """Have this row, with so many blocks and stop ids."""
        num_rows = len(self._data) if row < len(self._data) else 2 * len(self._data)
        width = self._tables.shape[1] if num_blocks <= self._tables.shape[1] else 2 * num_blocks
        if num_rows > len(self._data):
            self._data = np.concatenate([self._data, np.zeros(num_rows - len(self._data), ROW)])
        self._tables = _widened(self._tables, num_rows, width, 0)
        self._stop_ids = _widened(self._stop_ids, num_rows, max(num_stop_ids, self._stop_ids.shape[1]), NO_ID)


def _record(sequence: Sequence, block_size: int) -> tuple[float, ...]:
    """What stands in a new row, in the order of ROW."""
    sampling, num_tokens = sequence.request.sampling, len(sequence.token_ids)
    num_prompt = len(sequence.request.prompt_ids)
    return (
        sequence.token_ids[-1],
        num_tokens - 1,
        num_tokens - num_prompt,
        len(sequence.block_ids),
        sequence.reserved,
        blocks_for(num_prompt + sampling.max_tokens, block_size),
        sampling.min_tokens if sampling.stop_token_ids else 0,
        sampling.max_tokens - 1,
        sampling.seed,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        NO_LOGPROBS if sampling.num_logprobs is None else sampling.num_logprobs,
        True,
    )


def _fill_from_end(things: list[Any], row: int) -> None:
    last = things.pop()
    if row < len(things):
        things[row] = last


def _widened(columns: Int32, num_rows: int, width: int, empty: int) -> Int32:
    if columns.shape == (num_rows, width):
        return columns
    wider = np.full((num_rows, width), empty, np.int32)
    wider[: len(columns), : columns.shape[1]] = columns
    return wider
