"""What ranks tell each other and cluster/ about themselves: plain values that cross process borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # processes that only pass these values on need no numpy
    from kv_transfer.layout import KVLayout
    from kv_transfer.transport import Export


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a rank can be reached. control: host:port of its gRPC server; rendezvous_port: free for the collectives' store."""

    node: str
    rank: int
    pid: int
    host: str
    control: str
    rendezvous_port: int


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a rank's loading is. stage: waiting, connecting, loading weights, warming up, ready."""

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RankCounts:
    """What a rank holds now: read by tests, `baton status` and the demo's report."""

    node: str
    rank: int
    pid: int
    leader: bool
    total: int
    free: int
    cached: int
    held: int
    quarantined: int
    open_leases: int
    open_pulls: int
    sequences: int
    steps: int
    asleep: bool
    cpu_seconds: float

    def idle(self) -> bool:
        """Nothing runs and every block is accounted for."""
        counted = self.free + self.cached + self.held + self.quarantined
        return counted == self.total and not (self.held or self.quarantined or self.open_leases or self.open_pulls or self.sequences)


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """Blocks to read from the prefill node of one incarnation: source_blocks[i] at generations[i] into target_blocks[i]."""

    incarnation: bytes
    source_blocks: tuple[int, ...]
    generations: tuple[int, ...]
    target_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupHello:
    """Who a group is and all that its peers must agree on; the first thing said on a control stream.

    quantization: "w8a8", or "" for none. transfer_address and exports: where blocks can be pulled (prefill only).
    """

    node: str
    group: int
    incarnation: bytes
    model_fingerprint: str
    dtype: str
    quantization: str
    max_model_len: int
    layout: KVLayout
    ranks: tuple[RankAddress, ...]
    transfer_address: str = ""
    exports: tuple[Export, ...] = ()
