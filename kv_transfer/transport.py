"""The seam between what moves (spans of bytes) and how it moves. Knows no sockets, no leases and no layouts' meaning.

Two ends. A *source* makes its pool readable and says where in an Export; where reads are one-sided it has nothing more to do.
A *destination* reads one export's spans into one target buffer. Reads run on the rank's transfer thread, never on the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Incompatible, InvalidRequest
from kv_transfer.layout import MAX_BYTES, KVLayout

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
NONCE_BYTES = 16
MAX_ADDRESS_CHARS = 256


class Span(NamedTuple):
    """`nbytes` contiguous bytes, from an offset in the source's data to an offset in the target's."""

    source_offset: int
    target_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Many spans as columns, so that loops over them run in C. All three int64 [num_spans]."""

    source: Int64
    target: Int64
    nbytes: Int64

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Spans:
        """Columns from single spans."""
        table = np.array(list(spans), np.int64).reshape(-1, 3)
        return cls(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())

    def __len__(self) -> int:
        return len(self.nbytes)

    def __iter__(self) -> Iterator[Span]:
        return (Span(*row) for row in zip(self.source.tolist(), self.target.tolist(), self.nbytes.tolist(), strict=True))

    def __getitem__(self, part: slice) -> Spans:
        return Spans(self.source[part], self.target[part], self.nbytes[part])

    @property
    def total_bytes(self) -> int:
        """Bytes of all spans together."""
        return int(self.nbytes.sum())

    def check_within(self, source_bytes: int, target_bytes: int) -> None:
        """Raise InvalidRequest unless every span lies within both buffers."""
        if not len(self):
            return
        if int(self.nbytes.min()) <= 0 or int(self.source.min()) < 0 or int(self.target.min()) < 0:
            raise InvalidRequest("a span is empty or starts before its buffer", stage="pull", cause="span")
        for side, starts, limit in (("source", self.source, source_bytes), ("target", self.target, target_bytes)):
            over = np.flatnonzero(starts > limit - self.nbytes)  # so, since a sum may be too large for an int64
            if len(over):
                end = int(starts[over[0]]) + int(self.nbytes[over[0]])
                raise InvalidRequest(f"a span ends at byte {end} of a {side} buffer of {limit} bytes", stage="pull", cause="span")


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """The content that is expected: `generations[i]` in source block `blocks[i]`, before and after the read."""

    blocks: Int64
    generations: UInt64

    @classmethod
    def of(cls, blocks: Iterable[int], generations: Iterable[int]) -> Check:
        """A check of block ids and their announced generations."""
        check = cls(np.array(list(blocks), np.int64), np.array(list(generations), np.uint64))
        assert check.blocks.shape == check.generations.shape, "one generation per block"
        return check

    def stale_block(self, table: UInt64) -> int | None:
        """The first block whose generation in `table` [num_blocks] is another one (or that does not exist)."""
        if len(self.blocks) and (int(self.blocks.min()) < 0 or int(self.blocks.max()) >= len(table)):
            return int(self.blocks[(self.blocks < 0) | (self.blocks >= len(table))][0])
        wrong = np.flatnonzero(table[self.blocks] != self.generations)
        return int(self.blocks[wrong[0]]) if len(wrong) else None


@dataclass(frozen=True, slots=True)
class Export:
    """Where the blocks of one source rank can be read.

    host_id: equal on one host; a hint, proven by reading the nonce. shm_socket: abstract Unix socket ("@name") that hands over
    the memfd; tcp_address: host:port; each empty if not offered. nonce: 16 random bytes of this pool's life. pool_bytes: of data.
    Raises Incompatible where the values name nothing that can exist, since they come from peers.
    """

    rank: int
    layout: KVLayout
    host_id: str
    shm_socket: str
    tcp_address: str
    nonce: bytes
    pool_bytes: int

    def __post_init__(self) -> None:
        if len(self.nonce) != NONCE_BYTES:
            raise Incompatible(f"the nonce of source rank {self.rank} has {len(self.nonce)} bytes", stage="pull", cause="nonce")
        longest = max(map(len, (self.host_id, self.shm_socket, self.tcp_address)))
        if longest > MAX_ADDRESS_CHARS:
            raise Incompatible(f"an address of source rank {self.rank} has {longest} characters", stage="pull", cause="address")
        if not 0 <= self.pool_bytes <= MAX_BYTES:
            raise Incompatible(f"source rank {self.rank} exports {self.pool_bytes} bytes", stage="pull", cause="kv_pool")


class Ticket:
    """One read under way, made of parts that end one by one on the transfer thread.

    `future` is the only end: it resolves to the bytes read, or to a BatonError, when *every* part has ended. Before that, bytes may
    still land in the target; after it, none can: done means quiesced. A failed part stops the others at once, so failing is not slow.
    Cancelling an asyncio wrapper of the future does not stop the read: call `abort` and wait for the future.
    Ended by its parts; each of them by its bytes, the read's deadline, an abort, a dead peer or the thread's close.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self.future: Future[int] = Future()
        self.future.set_running_or_notify_cancel()
        self._post = post
        self._error: BatonError | None = None
        self._stops: list[Callable[[BatonError], None]] = []
        self._open_parts = 0
        self._bytes = 0
        self._sealed = False

    @property
    def quiesced(self) -> bool:
        """Whether no byte of this read can land any more."""
        return self.future.done()

    def poll(self) -> bool:
        """Whether the read has ended, well or badly: the same as quiesced, never earlier."""
        return self.future.done()

    def wait(self, deadline: Deadline) -> int:
        """Bytes read; raises the read's error, or DeadlineExceeded if it has not ended by then (it may then still write)."""
        try:
            return self.future.result(deadline.left_s())
        except FutureTimeout:
            raise DeadlineExceeded("the read has not ended in time", stage="pull") from None
        finally:
            del self  # as Future.result does: else the error and this frame keep each other, and the frames of all callers

    def abort(self, error: BatonError | None = None) -> None:
        """Stop the read from any thread; the future then fails with `error` (default Cancelled) once quiesced."""
        cause = error or Cancelled("the read was aborted", stage="pull")
        self._post(lambda: self.stop(cause))

    # The rest runs on the transfer thread only.

    def add_part(self, stop: Callable[[BatonError], None]) -> None:
        """Open a part. `stop(error)` must lead to `fail_part` unless the part has ended; called at once if the read has failed already."""
        self._open_parts += 1
        self._stops.append(stop)
        if self._error is not None:
            stop(self._error)

    def seal(self) -> None:
        """All parts have been added: the last one that ends, ends the read."""
        self._sealed = True
        self._settle()

    def end_part(self, nbytes: int) -> None:
        """One part has read all its bytes."""
        self._bytes += nbytes
        self._open_parts -= 1
        self._settle()

    def fail_part(self, error: BatonError) -> None:
        """One part has ended without all its bytes, and writes no more."""
        self._open_parts -= 1
        self.stop(error)
        self._settle()

    def stop(self, error: BatonError) -> None:
        """Have all parts end; the first error is the one reported."""
        if self._error is None and not self.future.done():
            self._error = error
            for stop in tuple(self._stops):
                stop(error)

    def _settle(self) -> None:
        if not self._sealed or self._open_parts or self.future.done():
            return
        self._stops.clear()  # they hold the parts, which hold mappings
        if self._error is None:
            self.future.set_result(self._bytes)
        else:
            # Without its traceback, whose frames would keep the source's mapping as long as somebody keeps the error.
            self.future.set_exception(self._error.with_traceback(None))


class Source(Protocol):
    """The serving end of one transport on one rank."""

    @property
    def address(self) -> str:
        """Where destinations find it, as the matching field of an Export says it."""

    def close(self) -> None:
        """Stop serving; runs on the transfer thread."""


class Destination(Protocol):
    """The reading end of one transport, bound to one export and one target buffer. All on the transfer thread."""

    @property
    def name(self) -> str:
        """The transport's name: loopback, shm or tcp."""

    def read(self, spans: Spans, check: Check, deadline: Deadline, ticket: Ticket) -> None:
        """Add parts to `ticket` and start them; each ends by end_part or fail_part, within the deadline. Spans fit both buffers."""

    def close(self, error: BatonError) -> None:
        """End all reads with `error` and free sockets and mappings."""
