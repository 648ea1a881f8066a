"""The reading end of one rank: connects to the ranks of a prefill node, and turns "these blocks into those" into one ticket."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, Incompatible, InvalidRequest, LeaseLost
from kv_transfer.choose import Transport, connect, host_id
from kv_transfer.layout import KVLayout
from kv_transfer.nonsense import nonsense
from kv_transfer.pool import Pool
from kv_transfer.reshard import SourceReads, plan, spans
from kv_transfer.resident import ahead
from kv_transfer.tcp_frame import MAX_BLOCKS
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Check, Destination, Export, Spans, Ticket


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """One prefill incarnation as this rank reads it: the plan, and a destination for each source rank in it.

    Made by Reader.connect, ended by Reader.forget or Reader.close.
    """

    reads: tuple[SourceReads, ...]
    exports: tuple[Export, ...]
    destinations: tuple[Destination, ...]  # one per entry of `reads`

    @property
    def transport(self) -> str:
        """For reports: the transports used, "shm" or "shm+tcp"."""
        return "+".join(sorted({destination.name for destination in self.destinations}))

    @property
    def block_bytes(self) -> int:
        """Bytes that this rank reads per block."""
        return sum(reads.block_bytes for reads in self.reads)

    def check_blocks(self, source_blocks: Sequence[int]) -> None:
        """Raise Incompatible for a block that some source rank does not have: it was announced by a source that says what cannot be."""
        num_blocks = min((self.exports[reads.source].layout.num_blocks for reads in self.reads), default=0)
        if any(not 0 <= block < num_blocks for block in source_blocks):
            raise nonsense(f"the source has {num_blocks} blocks, and announces others than those")


class Reader:
    """Reads blocks of prefill nodes into this rank's buffer `target` (layout.nbytes long).

    earlier: layouts of the node's ranks with smaller numbers, which read the same sources (see reshard.plan).
    Every method may be called from any thread; `connect` blocks and belongs in asyncio.to_thread. Ended by `close`.
    """

    def __init__(
        self,
        thread: TransferThread,
        target: memoryview,
        layout: KVLayout,
        *,
        transport: Transport = "auto",
        earlier: Sequence[KVLayout] = (),
        pools: Mapping[bytes, Pool] | None = None,
    ) -> None:
        assert len(target) == layout.nbytes
        self._thread = thread
        self._target = target
        self._layout = layout
        self._transport = transport
        self._earlier = tuple(earlier)
        self._pools = pools
        self._host_id = host_id()
        self._lock = threading.Lock()
        self._peers: dict[bytes, Peer] = {}
        thread.post(lambda: thread.on_exit(self._close_all))
        thread.post(lambda: thread.spare(ahead(target, write=True)))

    def connect(self, incarnation: bytes, exports: Sequence[Export], deadline: Deadline) -> Peer:
        """Plan and prove the way to a prefill node, once per incarnation. Raises Incompatible, Unavailable, DeadlineExceeded."""
        known = self._peers.get(incarnation)
        if known is not None:
            return known
        for export in exports:
            if export.pool_bytes != export.layout.nbytes:
                raise Incompatible(f"rank {export.rank} exports {export.pool_bytes} bytes of {export.layout.describe()}", stage="pull")
        reads = plan([export.layout for export in exports], self._layout, self._earlier)
        peer = Peer(reads, tuple(exports), self._destinations(reads, exports, deadline))
        return self._keep(incarnation, peer)

    def read(
        self,
        incarnation: bytes,
        source_blocks: Sequence[int],
        generations: Sequence[int],
        target_blocks: Sequence[int],
        deadline: Deadline,
    ) -> Ticket:
        """Fill `target_blocks[i]` with what block `source_blocks[i]` held under `generations[i]`; returns at once.

        The ticket fails with LeaseLost, NodeLost, DeadlineExceeded, Cancelled or Unavailable; then the target blocks' bytes are anything.
        Raises LeaseLost if the incarnation is not connected, Incompatible if the source has no such block, InvalidRequest if this rank
        has not, or for too many at once.
        """
        peer = self._peers.get(incarnation)
        if peer is None:
            raise LeaseLost("the prefill node's incarnation is not connected", stage="pull", cause="incarnation")
        if len(source_blocks) > MAX_BLOCKS:
            raise InvalidRequest(f"{len(source_blocks)} blocks in one read; {MAX_BLOCKS} are the most", stage="pull", cause="blocks")
        peer.check_blocks(source_blocks)
        check = Check.of(source_blocks, generations)
        jobs = [(at, spans(reads.runs, source_blocks, target_blocks)) for at, reads in enumerate(peer.reads)]
        for at, job in jobs:
            job.check_within(peer.exports[peer.reads[at].source].pool_bytes, len(self._target))
        ticket = self._thread.ticket()
        self._thread.post(lambda: self._start(peer, jobs, check, deadline, ticket))
        return ticket

    def forget(self, incarnation: bytes) -> None:
        """The incarnation is dead: its reads end with LeaseLost, sockets and mappings go."""
        with self._lock:
            peer = self._peers.pop(incarnation, None)
        if peer is not None:
            gone = LeaseLost("the prefill node is gone", stage="pull", cause="incarnation")
            self._thread.post(partial(_close, peer.destinations, gone))

    def close(self) -> None:
        """End all reads with Cancelled and free everything; later reads are refused."""
        self._thread.post(lambda: self._close_all(Cancelled("the reader was closed", stage="pull")))

    def _destinations(self, reads: Sequence[SourceReads], exports: Sequence[Export], deadline: Deadline) -> tuple[Destination, ...]:
        opened: list[Destination] = []
        try:
            for source in (exports[part.source] for part in reads):
                opened.append(self._connect(source, deadline))
        except BatonError as error:
            self._thread.post(partial(_close, tuple(opened), error))
            raise
        return tuple(opened)

    def _connect(self, export: Export, deadline: Deadline) -> Destination:
        return connect(
            export, self._target, self._thread, deadline, own_host_id=self._host_id, transport=self._transport, pools=self._pools
        )

    def _keep(self, incarnation: bytes, peer: Peer) -> Peer:
        """Two callers may have connected at once: the first one's stays."""
        with self._lock:
            kept = self._peers.setdefault(incarnation, peer)
        if kept is not peer:
            self._thread.post(partial(_close, peer.destinations, Cancelled("connected twice", stage="pull")))
        return kept

    def _start(self, peer: Peer, jobs: Sequence[tuple[int, Spans]], check: Check, deadline: Deadline, ticket: Ticket) -> None:
        for at, job in jobs:
            if len(job):
                peer.destinations[at].read(job, check, deadline, ticket)
        ticket.seal()

    def _close_all(self, error: BatonError) -> None:
        with self._lock:
            peers, self._peers = self._peers, {}
        for peer in peers.values():
            _close(peer.destinations, error)


def _close(destinations: Sequence[Destination], error: BatonError) -> None:
    for destination in destinations:
        destination.close(error)
