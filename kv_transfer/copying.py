"""Copying spans from one buffer to another, in portions. Knows bytes only.

One call copies a whole portion: a loop in C (native/spans.c), which holds no lock of the interpreter. Where it was not built, Python
does, and gives up and takes that lock once per span, for which a busy thread may let it wait. There, small spans, whose loop would cost
more than the copying, are found to come in regular patterns (one piece per layer and part, at fixed steps), and numpy copies those as
strided arrays. Tested to do the same.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kv_transfer.native import CopySpans, copy_spans
from kv_transfer.pool import address_of
from kv_transfer.transport import Int64, Spans

UInt8 = NDArray[np.uint8]

SLICE_BYTES = 8 * 2**20  # the most copied between two looks at sockets, aborts and deadlines: about a millisecond
_STRIDED_BELOW = 64 * 2**10
_MIN_PATTERN = 4

_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None


def move(spans: Spans, source: memoryview, target: memoryview) -> None:
    """Copy all spans, which lie within both buffers."""
    loop = copy_spans()
    if loop is None:
        move_by_python(spans, source, target)
    elif len(spans):
        _copy_by(loop, spans, source, target)


def _copy_by(loop: CopySpans, spans: Spans, source: memoryview, target: memoryview) -> None:
    columns = [np.ascontiguousarray(column, np.int64) for column in (spans.target, spans.source, spans.nbytes)]
    loop(address_of(target), address_of(source), *(column.ctypes.data for column in columns), len(spans))


def move_by_python(spans: Spans, source: memoryview, target: memoryview) -> None:
    """The same without compiled code."""
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
