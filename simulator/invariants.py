"""What must be true at every event, at the end of every request, and at the end of every world. Raises Violation where it is not.

Knows what clients saw and what leaders hold; nothing of schedules or of how anything was brought about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.engine.blocks import BlockState
from baton.errors import BatonError, Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable
from baton.request import Chunk, FinishReason
from prefill_node.leader import PrefillLeader
from simulator.engine import Violation
from simulator.groups import Leader, SimGroup
from simulator.model import Expected

GRACE_S = 1.5  # how late after its deadline a client may hear of it
LONG_S = 55.0  # a request that has so much time outlives every fault of its schedule
LOOK_EVERY = 16  # events of a process between two looks at its leases
CHECK_EVERY = 256  # events between two full checks of its pool


@dataclass(slots=True)
class ChoiceRecord:
    """What has come of one choice of an answer, and what must come."""

    expected: Expected
    logprobs: bool
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def take(self, chunk: Chunk) -> None:
        """Compare a chunk with the undisturbed answer."""
        at, expected = len(self.token_ids), self.expected
        if self.finish_reason is not None:
            raise Violation("a chunk came after the last one of its choice")
        self.token_ids += chunk.token_ids
        self.text += chunk.text
        if tuple(self.token_ids) != expected.token_ids[: len(self.token_ids)]:
            raise Violation(f"token {at}: {self.token_ids} came, {list(expected.token_ids)} should")
        if not expected.text.startswith(self.text):
            raise Violation(f"text {self.text!r} came, {expected.text!r} should")
        if self.logprobs and tuple(item.logprob for item in chunk.logprobs) != expected.logprobs[at : len(self.token_ids)]:
            raise Violation(f"logprobs {chunk.logprobs} came at {at}, {expected.logprobs} should")
        self.finish_reason = chunk.finish_reason
        if self.finish_reason is not None:
            self._check_end()

    def _check_end(self) -> None:
        expected = self.expected
        if (tuple(self.token_ids), self.text, self.finish_reason) != (expected.token_ids, expected.text, expected.finish_reason):
            raise Violation(f"it ended with {self.token_ids} {self.text!r} {self.finish_reason}, and should with {expected}")


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are the world's, seconds.

    outcome: "" while it is under way; "finished", "left" (the client did), or the cause of its error. excused: whether its router was
    killed or stopped meanwhile, so that nobody could have answered. stalled: whether the client has stopped reading. roomy: whether no
    queue is so short that it could be full. sure: whether it must be finished if it has time enough.
    tokenless: whether some step may find no token to draw.
    """

    name: str
    began_s: float
    timeout_s: float
    choices: list[ChoiceRecord]
    prompt_len: int
    roomy: bool
    sure: bool
    tokenless: bool
    excused: bool = False
    stalled: bool = False
    usage_seen: bool = False
    outcome: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def take(self, chunk: Chunk) -> None:
        """A chunk has come."""
        self.choices[chunk.choice].take(chunk)
        if chunk.usage is not None and all(choice.finish_reason for choice in self.choices):
            self.usage_seen = True
            if (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) != (self.prompt_len, self.num_tokens):
                raise Violation(f"{self.name}: usage {chunk.usage}, with {self.prompt_len} and {self.num_tokens} tokens")

    def end(self, now_s: float, error: BatonError | None, *, gave_up: bool) -> None:
        """The one terminal event has come. gave_up: none has, until the client's own patience was over."""
        if self.outcome:
            raise Violation(f"{self.name}: a second end after {self.outcome}")
        self.outcome = "finished" if error is None else error.cause
        if gave_up and not (self.excused or self.stalled):
            raise Violation(f"{self.name}: no answer within its deadline of {self.timeout_s:g} s")
        late_s = now_s - self.began_s - self.timeout_s
        if late_s > GRACE_S and not (self.excused or self.stalled):
            raise Violation(f"{self.name}: {self.outcome} came {late_s:.2f} s after its deadline")
        if error is None:
            self._check_whole()
        elif not gave_up:
            self._check_error(error, now_s)

    def _check_whole(self) -> None:
        if not self.usage_seen or any(choice.finish_reason is None for choice in self.choices):
            raise Violation(f"{self.name}: its stream ended well, but the answer is not whole")

    def _check_error(self, error: BatonError, now_s: float) -> None:
        """Which errors may be told, and when."""
        early = now_s - self.began_s < self.timeout_s - 0.001
        allowed = (
            (isinstance(error, DeadlineExceeded) and not early and not (self.sure and self.timeout_s >= LONG_S))
            or (isinstance(error, Cancelled) and error.cause == "slow_client" and self.stalled)
            or (isinstance(error, ResourceExhausted) and not self.num_tokens and not self.roomy)
            or (isinstance(error, Unavailable) and error.cause == "no_nodes" and not self.num_tokens and self.timeout_s < LONG_S)
            or (isinstance(error, Unavailable | DeadlineExceeded) and self.excused)
            or (error.cause == "logits" and self.tokenless)
        )
        if not allowed:
            kind = type(error).__name__
            raise Violation(f"{self.name}: after {now_s - self.began_s:.2f} s and {self.num_tokens} tokens it was told {kind}: {error}")


def watch(group: SimGroup) -> Callable[[], None]:
    """What is looked at after each event of a group's process."""
    pool, leader, num_events = group.leader.pool, group.leader, 0

    def look() -> None:
        nonlocal num_events
        num_events += 1
        counts = pool.counts()
        if not counts.balanced():
            raise Violation(f"{group.name}: {counts} do not add up")
        if num_events % LOOK_EVERY == 0 and isinstance(leader, PrefillLeader):
            check_leases(group.name, leader)
        if num_events % CHECK_EVERY == 0:
            pool.check()

    return look


def check_leases(name: str, leader: PrefillLeader) -> None:
    """Every block that somebody may be reading is held, with the content that was announced."""
    for lease in leader.transfer.leases():
        for block, generation in lease.blocks if lease.links or not lease.state.ended else ():
            state = leader.pool.state(block)
            if state is not BlockState.HELD or leader.pool.generation(block) != generation:
                reads = f"attempts {sorted(lease.links)} may read" if lease.links else "is promised"
                raise Violation(f"{name}: block {block} of lease {lease.number:x}, which {reads}, is {state.value}")


def leftovers(name: str, leader: Leader) -> list[str]:
    """What a group still holds although nobody wants anything of it."""
    load, counts = leader.load(), leader.pool.counts()
    found = {
        "blocks": not counts.idle() and counts,
        "leases": load.open_leases,
        "pulls": load.open_pulls,
        "desk entries": len(leader.desk),
        "waiting": load.waiting_sequences,
        "running": load.running_sequences,
        "scheduled": not leader.scheduler.idle(),
    }
    return [f"{name}: {what} {held}" for what, held in found.items() if held]
