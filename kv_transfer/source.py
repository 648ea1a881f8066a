"""The serving end of one rank: opens a listener per transport, says where in an Export, closes them. Knows no leases."""

from __future__ import annotations

from baton.deadline import Deadline
from baton.errors import BatonError
from kv_transfer.choose import host_id
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.resident import ahead
from kv_transfer.shm import ShmSource
from kv_transfer.tcp_source import TcpSource
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export, Source

START_S = 5.0


class SourceRank:
    """Makes one rank's pool readable. Ended by `close`, or with its transfer thread. Close it before the pool.

    shm is offered if the pool is shared and `shm` says so, tcp if `tcp` does, on `host` (loopback unless told otherwise), any free port.
    """

    def __init__(
        self,
        thread: TransferThread,
        pool: Pool,
        layout: KVLayout,
        *,
        rank: int = 0,
        host: str = "127.0.0.1",
        shm: bool = True,
        tcp: bool = True,
    ) -> None:
        assert layout.num_blocks == pool.num_blocks and layout.block_bytes == pool.block_bytes
        self._thread = thread
        self._closed = False
        self._shm = thread.run(lambda: ShmSource(thread, pool), Deadline.after(START_S)) if shm and pool.shared else None
        self._tcp = thread.run(lambda: TcpSource(thread, pool, host), Deadline.after(START_S)) if tcp else None
        self.export = Export(
            rank=rank,
            layout=layout,
            host_id=host_id(),
            shm_socket=self._shm.address if self._shm else "",
            tcp_address=self._tcp.address if self._tcp else "",
            nonce=pool.nonce,
            pool_bytes=len(pool.data),
        )
        thread.run(lambda: thread.on_exit(self._end), Deadline.after(START_S))
        thread.post(lambda: thread.spare(ahead(pool.data, write=True)))

    def close(self) -> None:
        """Serve no more, from any thread; returns when all sockets are closed."""
        if self._thread.alive:
            self._thread.run(self._close, Deadline.after(START_S))

    def _close(self) -> None:
        if not self._closed:
            self._thread.off_exit(self._end)
            self._end(None)

    def _end(self, _: BatonError | None) -> None:
        self._closed = True
        sources: tuple[Source | None, ...] = (self._shm, self._tcp)
        for source in sources:
            if source is not None:
                source.close()
