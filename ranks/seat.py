"""Where a group's leader sits: what it needs of the process it runs in. The simulator has another one, without tensors."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from baton.config import RankPlan
from baton.engine.batch import Batch
from baton.engine.runner import StepOutcome
from kv_transfer.transport import Export
from ranks.facts import GroupHello


class Seat(Protocol):
    """A rank's process as its leader sees it (see ranks.host.RankHost). num_blocks: of its pool; block_bytes: of one block on one rank."""

    @property
    def plan(self) -> RankPlan:
        """The rank's place in the cluster."""

    @property
    def incarnation(self) -> bytes:
        """16 random bytes of this life."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of every rank of the group."""

    @property
    def max_model_len(self) -> int:
        """The longest prompt plus answer, tokens."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are below this number."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank."""

    @property
    def control_address(self) -> str:
        """host:port of this rank's gRPC server."""

    def step(self, batch: Batch | None) -> Awaitable[StepOutcome]:
        """One step together with the domain."""

    def step_begun(self) -> Awaitable[None]:
        """Until the step that was asked for last is under way."""

    def wake_others(self, epoch: int) -> Awaitable[None]:
        """Call the other ranks of the domain to step `epoch`."""

    def hello(self, transfer_address: str = "", exports: tuple[Export, ...] = ()) -> GroupHello:
        """Who this rank's group is."""
