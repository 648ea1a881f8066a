"""A prefill rank's pool in a process of its own, full of bytes, until its input ends: what a transport reads from. Imports no torch.

Argument: a layout as JSON. Output: one line of JSON, the export.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np

from baton.deadline import Deadline
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.source import SourceRank
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export

END_S = 10.0


@contextmanager
def served(layout: KVLayout) -> Iterator[Export]:
    """A process that serves a pool of this layout, generation 1 in every block; ended with the `with` block."""
    command = [sys.executable, "-m", "bench.micro.pool_process", json.dumps(asdict(layout))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield _export(json.loads(process.stdout.readline()), layout)
        finally:
            process.stdin.close()
            process.wait(END_S)


def _export(fields: dict[str, str], layout: KVLayout) -> Export:
    return Export(
        rank=0,
        layout=layout,
        host_id=fields["host_id"],
        shm_socket=fields["shm_socket"],
        tcp_address=fields["tcp_address"],
        nonce=bytes.fromhex(fields["nonce"]),
        pool_bytes=layout.nbytes,
    )


def _serve(layout: KVLayout) -> None:
    pool = Pool(layout.num_blocks, layout.block_bytes)
    np.frombuffer(pool.data, np.uint8)[:] = 1
    pool.generations[:] = 1
    thread = TransferThread()
    export = SourceRank(thread, pool, layout).export
    said = {"host_id": export.host_id, "shm_socket": export.shm_socket, "tcp_address": export.tcp_address, "nonce": export.nonce.hex()}
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    thread.close(Deadline.after(END_S))
    pool.close()


def _layout(fields: dict[str, object]) -> KVLayout:
    return KVLayout(**fields | {name: tuple(fields[name]) for name in ("axes", "part_dims")})  # type: ignore[arg-type]


if __name__ == "__main__":
    _serve(_layout(json.loads(sys.argv[1])))
