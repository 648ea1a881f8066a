"""Which transport reaches an export from here. Knows what each needs to be proven, not how it works."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from baton.deadline import Deadline
from baton.errors import Incompatible, Unavailable
from kv_transfer.loopback import LoopbackDestination
from kv_transfer.pool import Pool
from kv_transfer.shm import ShmDestination
from kv_transfer.tcp import TcpDestination
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Destination, Export

Transport = Literal["auto", "shm", "tcp", "loopback"]
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")


def host_id() -> str:
    """Equal for processes that can meet at an abstract Unix socket: one kernel, one network namespace, one user."""
    return f"{_BOOT_ID.read_text().strip()}/{_NETWORK.stat().st_ino}/{os.getuid()}"


def connect(
    export: Export,
    target: memoryview,
    thread: TransferThread,
    deadline: Deadline,
    *,
    own_host_id: str,
    transport: Transport = "auto",
    pools: Mapping[bytes, Pool] | None = None,
) -> Destination:
    """The way to read `export` into `target`. Blocks for the proof (at most about 2 s): not for the loop.

    auto: shm if the host ids are equal and the nonce was read through the mapping, else tcp. shm, tcp: that one or an error.
    loopback: `pools` of this process by nonce. Raises Unavailable or Incompatible, saying what was missing.
    """
    if transport == "loopback":
        return _loopback(export, target, thread, pools or {})
    if transport == "shm":
        return ShmDestination.connect(thread, export, target, deadline)
    if transport == "auto" and export.shm_socket and export.host_id == own_host_id:
        try:
            return ShmDestination.connect(thread, export, target, deadline)
        except (Unavailable, Incompatible):
            if not export.tcp_address:
                raise
    return TcpDestination.connect(thread, export, target)


def _loopback(export: Export, target: memoryview, thread: TransferThread, pools: Mapping[bytes, Pool]) -> Destination:
    pool = pools.get(export.nonce)
    if pool is None:
        raise Unavailable(f"source rank {export.rank} is not in this process", stage="pull", cause="loopback")
    return LoopbackDestination(thread, pool, target)
