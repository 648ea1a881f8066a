"""Reading a mapped pool, checked before and after, in slices. Knows not whose mapping it is: loopback and shm bring theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from baton.deadline import Deadline
from baton.errors import BatonError, DeadlineExceeded, LeaseLost
from kv_transfer.copying import move, sliced
from kv_transfer.pool import View
from kv_transfer.resident import ahead
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Check, Spans, Ticket


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

    def map_ahead(self) -> Iterator[None]:
        """Have the pages of the source mapped before they are read for the first time: work for the thread, ended by `close`."""
        steps = iter(()) if self._view is None else ahead(self._view.data, write=False)
        while self._view is not None and next(steps, _DONE) is not _DONE:
            yield

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


_DONE = object()


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
