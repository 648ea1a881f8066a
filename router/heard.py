"""What a node says on its control stream, as plain values. Knows no messages and no streams."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.errors import BatonError
from baton.request import BlockCounts, Drawn, TokenEvent

NO_BLOCKS = BlockCounts(total=0, free=0, cached=0, held=0, quarantined=0)


@dataclass(frozen=True, slots=True)
class Layout:
    """What two peers' KV caches must share; how many blocks and which heads a rank holds is its own affair."""

    axes: tuple[str, ...]
    block_size: int
    part_dims: tuple[int, ...]
    dtype: str
    model_num_layers: int
    model_num_kv_heads: int


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a group."""

    rank: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """A group's own figures at its last beat; a hint for the policy, never a promise. Times in seconds since its start."""

    waiting_sequences: int = 0
    running_sequences: int = 0
    waiting_tokens: int = 0
    blocks: BlockCounts = NO_BLOCKS
    open_leases: int = 0
    open_pulls: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    draining: bool = False

    @property
    def idle(self) -> bool:
        """Whether the group has no sequence, lease or pull."""
        return not (self.waiting_sequences or self.running_sequences or self.open_leases or self.open_pulls)


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a group is in this life. incarnation: 16 random bytes. transfer_address: where Pull is served (prefill only)."""

    node: str
    group: int
    incarnation: bytes
    protocol_version: int
    model_fingerprint: str
    dtype: str
    quantization: str
    max_model_len: int
    layout: Layout
    ranks: tuple[Rank, ...] = ()
    transfer_address: str = ""


@dataclass(frozen=True, slots=True)
class PullReport:
    """One finished pull. seconds: from opening it to the last verified read; exposed_s: since the last announcement."""

    request_id: str
    attempt: int
    blocks_pulled: int
    blocks_matched: int
    bytes_pulled: int
    seconds: float
    exposed_s: float
    transport: str


@dataclass(frozen=True, slots=True)
class PullTotals:
    """What a decode group has pulled in this router's life. seconds: the sum over pulls, which overlap. transport: of the last one."""

    pulls: int = 0
    blocks_pulled: int = 0
    blocks_matched: int = 0
    bytes_pulled: int = 0
    seconds: float = 0.0
    exposed_s: float = 0.0
    transport: str = ""

    def plus(self, report: PullReport) -> PullTotals:
        """The totals after one more pull."""
        return PullTotals(
            self.pulls + 1,
            self.blocks_pulled + report.blocks_pulled,
            self.blocks_matched + report.blocks_matched,
            self.bytes_pulled + report.bytes_pulled,
            self.seconds + report.seconds,
            self.exposed_s + report.exposed_s,
            report.transport,
        )


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """A node ended an attempt without a finish."""

    request_id: str
    attempt: int
    error: BatonError


@dataclass(frozen=True, slots=True)
class Heard:
    """Everything that one message of a node says."""

    hello: Hello | None = None
    load: GroupLoad | None = None
    tokens: tuple[TokenEvent, ...] = ()
    drawn: Drawn = field(default_factory=Drawn)
    accepted: tuple[tuple[str, int], ...] = ()  # (request id, attempt)
    failed: tuple[SequenceFailed, ...] = ()
    pulls: tuple[PullReport, ...] = ()
    flushed: tuple[tuple[int, int], ...] = ()  # (number of the command, blocks freed)
    known: tuple[tuple[str, int, int], ...] = ()  # (request id, attempt, next index): the answers to a Check
