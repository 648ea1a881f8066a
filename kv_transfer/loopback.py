"""Reads between pools of one process: what tests, the offline engine and a single-process node use. Knows no sockets."""

from __future__ import annotations

from baton.deadline import Deadline
from baton.errors import BatonError
from kv_transfer.memory import MemoryReads
from kv_transfer.pool import Pool
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Check, Spans, Ticket


class LoopbackDestination:
    """Reads a pool of this process, checked like any other. Ends with its thread or by `close`."""

    name = "loopback"

    def __init__(self, thread: TransferThread, source: Pool, target: memoryview) -> None:
        self._reads = MemoryReads(thread, source.view, source.nonce, target, lost=_never)

    def read(self, spans: Spans, check: Check, deadline: Deadline, ticket: Ticket) -> None:
        """See Destination."""
        self._reads.read(spans, check, deadline, ticket)

    def close(self, error: BatonError) -> None:
        """See Destination."""
        self._reads.close(error)


def _never() -> BatonError | None:
    return None
