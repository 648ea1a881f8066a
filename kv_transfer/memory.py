"""Copying spans out of a mapped pool, in slices. Knows not whose mapping it is: loopback and shm bring theirs.

memmove releases the GIL and reaches 0.6–0.8 of memcpy from 128 KiB a span up; for smaller spans the loop around it costs as much as the
copying. Those come in regular patterns (one piece per layer and part, at fixed steps), which numpy copies as one strided array.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded, LeaseLost
from kv_transfer.pool import View, address_of
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Check, Int64, Spans, Ticket

UInt8 = NDArray[np.uint8]

SLICE_BYTES = 8 * 2**20  # the most copied between two looks at sockets, aborts and deadlines: about a millisecond
_STRIDED_BELOW = 64 * 2**10
_MIN_PATTERN = 4

_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None


class MemoryReads:
    """Reads from one source mapping into one target buffer. Lives on the transfer thread; ended by `close`, which lets go of the mapping.

    lost: called before and after each read, returns why the source cannot be trusted any more, if so.
    """

    def __init__(self, thread: TransferThread, view: View, nonce: bytes, target: memoryview, lost: Callable[[], BatonError | None]) -> None:
        self.target = target
        self._view: View | None = view
        self._thread = thread
        self._nonce = nonce
        self._lost = lost
        self._copies: set[_Copy] = set()
        self._closed: BatonError | None = None

    def read(self, spans: Spans, check: Check, deadline: Deadline, ticket: Ticket) -> None:
        """Add one part to `ticket` and copy; the part ends by its bytes, the deadline, a stop, or a check that fails."""
        copy = _Copy(self, spans, check, deadline, ticket)
        self._copies.add(copy)
        ticket.add_part(copy.end)
        if self._closed is not None:
            copy.end(self._closed)
        self._thread.work(copy.slices())

    def close(self, error: BatonError) -> None:
        """End all copies with `error`, at once: nothing is copied but by this very thread."""
        self._closed = self._closed or error
        self._view = None
        for copy in tuple(self._copies):
            copy.end(error)

    @property
    def view(self) -> View:
        """The source, while it is open."""
        assert self._view is not None, "closed reads do not copy"
        return self._view

    def verify(self, check: Check) -> None:
        """Raise NodeLost or LeaseLost unless the source lives and holds what was announced.

        Whoever gives a block another content stamps its generation first: so a copy that has any of it finds the stamp afterwards.
        Between the last slice and this there is a turn of the thread, in which the interpreter's lock is given up and taken again:
        that keeps copy and look in this order also on processors that reorder loads (arm64).
        """
        lost = self._lost()
        if lost is not None:
            raise lost
        if not self.view.alive(self._nonce):
            raise LeaseLost("the source's memory was given up (nonce changed)", stage="pull", cause="nonce")
        stale = check.stale_block(self.view.generations)
        if stale is not None:
            raise LeaseLost(f"source block {stale} holds other content than announced", stage="pull", cause="generation")

    def ended(self, copy: _Copy) -> None:
        """A copy is over."""
        self._copies.discard(copy)


class _Copy:
    """One part of a read: verify, copy slice by slice, verify again."""

    def __init__(self, reads: MemoryReads, spans: Spans, check: Check, deadline: Deadline, ticket: Ticket) -> None:
        self._reads = reads
        self._spans = spans
        self._check = check
        self._deadline = deadline
        self._ticket = ticket
        self._over = False

    def slices(self) -> Iterator[None]:
        """The work; between two steps the thread serves others, and may end this."""
        try:
            if self._proceeds():
                self._reads.verify(self._check)
            for part in sliced(self._spans):
                if not self._proceeds():
                    return
                move(part, self._reads.view.data, self._reads.target)
                yield
            if self._proceeds():
                self._reads.verify(self._check)
                self.end(None)
        except BatonError as error:
            self.end(error)

    def end(self, error: BatonError | None) -> None:
        """Report to the ticket, once. Called on the thread that copies, so nothing is copied after it."""
        if self._over:
            return
        self._over = True
        self._reads.ended(self)
        if error is None:
            self._ticket.end_part(self._spans.total_bytes)
        else:
            self._ticket.fail_part(error)

    def _proceeds(self) -> bool:
        if not self._over and self._deadline.passed():
            self.end(DeadlineExceeded("the blocks were not read in time", stage="pull"))
        return not self._over


def sliced(spans: Spans) -> Iterator[Spans]:
    """The spans in portions of at most SLICE_BYTES."""
    spans = _shortened(spans)
    ends = np.cumsum(spans.nbytes)
    at = 0
    while at < len(spans):
        done = int(ends[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(ends, done + SLICE_BYTES, side="right")))
        yield spans[at:until]
        at = until


def _shortened(spans: Spans) -> Spans:
    """Spans of more than SLICE_BYTES, as neighbouring blocks make them, cut into several."""
    counts = -(-spans.nbytes // SLICE_BYTES)
    if not (counts > 1).any():
        return spans
    of = np.repeat(np.arange(len(spans)), counts)
    at = SLICE_BYTES * (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts))
    return Spans(spans.source[of] + at, spans.target[of] + at, np.minimum(spans.nbytes[of] - at, SLICE_BYTES))


def move(spans: Spans, source: memoryview, target: memoryview) -> None:
    """Copy all spans, which lie within both buffers."""
    at = 0
    for start, end in _regular(spans):
        _move_each(spans[at:start], source, target)
        _move_strided(spans[start:end], source, target)
        at = end
    _move_each(spans[at:], source, target)


def _regular(spans: Spans) -> Iterator[tuple[int, int]]:
    """Ranges of at least _MIN_PATTERN small spans of one size at fixed steps on both sides; in order, without overlap."""
    if len(spans) < _MIN_PATTERN or int(spans.nbytes.min()) >= _STRIDED_BELOW:
        return
    steps = np.stack([np.diff(spans.source), np.diff(spans.target), np.diff(spans.nbytes)])
    starts = np.flatnonzero(np.concatenate([[True], (steps[:, 1:] != steps[:, :-1]).any(axis=0)]))
    ends = np.append(starts[1:], len(spans) - 1)  # steps start..end - 1 are equal, so spans start..end are regular
    keep = (ends - starts >= _MIN_PATTERN) & (steps[2, starts] == 0) & (spans.nbytes[starts] < _STRIDED_BELOW)
    at = 0
    for start, end in zip(starts[keep].tolist(), (ends[keep] + 1).tolist(), strict=True):
        yield max(start, at), end
        at = end


def _move_each(spans: Spans, source: memoryview, target: memoryview) -> None:
    if len(spans):
        sources = (spans.source + address_of(source)).tolist()
        targets = (spans.target + address_of(target)).tolist()
        deque(map(_memmove, targets, sources, spans.nbytes.tolist()), maxlen=0)


def _move_strided(spans: Spans, source: memoryview, target: memoryview) -> None:
    _rows(spans.target, spans, target)[...] = _rows(spans.source, spans, source)


def _rows(starts: Int64, spans: Spans, buffer: memoryview) -> UInt8:
    """uint8 [num_spans, nbytes], a view at fixed steps; numpy refuses one that leaves the buffer."""
    return np.ndarray((len(starts), int(spans.nbytes[0])), np.uint8, buffer, int(starts[0]), (int(starts[1] - starts[0]), 1))
