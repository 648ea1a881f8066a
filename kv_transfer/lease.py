"""A prefill's promise to keep blocks readable, as a state machine. Pure: time comes in as an argument, effects go out as values.

A *link* is one open Pull, named by its attempt. Its peer may read blocks until the link has closed, so a lease that ended
is *settled*, and its blocks may be used again, only when it has no link any more: a timer alone never frees a block.
A settled lease leaves a tombstone, so that late messages about it are answered instead of awaited.

A lease that no decode counts on is revocable (design rule 3): it is *rewound*, as if it had just been opened, and its blocks may be
used at once, since nobody has been told of them; its prompt is computed and announced again under the same number.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import BatonError, InvalidRequest, LeaseLost, ResourceExhausted
from baton.lifecycle import Lifecycle
from baton.request import FinishReason, TokenEvent, TokenLogprob


class LeaseState(enum.Enum):
    """Where a lease is in its life. Also one whose request comes first is EXPECTED, for no longer than `LeaseTable.open` takes."""

    EXPECTED = "expected"  # a Pull came before its request
    OPEN = "open"  # computing, announcing
    COMPLETE = "complete"  # all announced, held for the puller
    RELEASED = "released"
    EXPIRED = "expired"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the promise is over."""
        return self not in (LeaseState.EXPECTED, LeaseState.OPEN, LeaseState.COMPLETE)


class LeaseEvent(enum.Enum):
    """What can happen to a lease."""

    OPEN = "open"
    ANNOUNCE = "announce"
    FINISH = "finish"  # the last announcement
    RELEASE = "release"
    REWIND = "rewind"  # the blocks are taken back and will be computed again
    EXPIRE = "expire"
    FAIL = "fail"


_ENDS = {LeaseEvent.EXPIRE: LeaseState.EXPIRED, LeaseEvent.FAIL: LeaseState.FAILED}
LEASE_LIFE = Lifecycle(
    "lease",
    LeaseState.EXPECTED,
    {
        (LeaseState.EXPECTED, LeaseEvent.OPEN): LeaseState.OPEN,
        (LeaseState.OPEN, LeaseEvent.ANNOUNCE): LeaseState.OPEN,
        (LeaseState.OPEN, LeaseEvent.FINISH): LeaseState.COMPLETE,
        (LeaseState.OPEN, LeaseEvent.REWIND): LeaseState.OPEN,
        (LeaseState.COMPLETE, LeaseEvent.REWIND): LeaseState.OPEN,
        (LeaseState.COMPLETE, LeaseEvent.RELEASE): LeaseState.RELEASED,
        **{(state, event): end for state in LeaseState if not state.ended for event, end in _ENDS.items()},
    },
)


@dataclass(frozen=True, slots=True)
class FinalToken:
    """What prefill sampled after the prompt; decode repeats it in its first event. finish_reason: set if it ends the request."""

    output_index: int
    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, event: TokenEvent) -> FinalToken:
        """From prefill's one token event."""
        return cls(event.output_index, event.token_ids[0], event.logprobs[0] if event.logprobs else None, event.finish_reason)

    def event(self, request_id: str, attempt: int) -> TokenEvent:
        """As decode's own event, under its attempt."""
        logprobs = () if self.logprob is None else (self.logprob,)
        return TokenEvent(request_id, attempt, self.output_index, (self.token_id,), logprobs, self.finish_reason)


@dataclass(frozen=True, slots=True)
class Announced:
    """Blocks first_block … of the prompt are readable on every rank of the source, with these generations. final: on the last one only."""

    first_block: int
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    final: FinalToken | None = None


@dataclass(slots=True)
class Lease:
    """One lease. Owned by its LeaseTable; ends by release, failure or `deadline_s`, settles when its last link closes.

    attempt: the highest that has pulled, 0 before any. links: attempts whose Pull is open. opened: its request has come.
    accepted: a decode group has reserved room for the reader; no longer once that has left. blocks: (id, generation) announced.
    error: why it failed.
    deadline_s: when it expires, on the caller's clock.
    """

    number: int
    state: LeaseState
    deadline_s: float
    request_deadline_s: float = math.inf
    attempt: int = 0
    opened: bool = False
    accepted: bool = False
    links: set[int] = field(default_factory=set)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    final: FinalToken | None = None
    error: BatonError | None = None

    @property
    def settled(self) -> bool:
        """Whether the promise is over and nobody can be reading."""
        return self.state.ended and not self.links

    @property
    def revocable(self) -> bool:
        """Whether its request has come and no decode counts on it: none has accepted, none is pulling."""
        return self.opened and not (self.state.ended or self.accepted or self.links)

    def apply(self, event: LeaseEvent) -> None:
        """The only way to change the state; raises InternalError for an event that cannot happen in it."""
        self.state = LEASE_LIFE.after(self.state, event)

    def announced_from(self, first_block: int) -> Announced:
        """Everything announced so far, from a block of the prompt on. Raises InvalidRequest if the prompt is known to end before it."""
        blocks = self.blocks[first_block:]
        if self.state is LeaseState.COMPLETE and first_block > len(self.blocks):
            why = f"a Pull says that it has {first_block} blocks of a prompt of {len(self.blocks)}"
            raise InvalidRequest(why, stage="pull", cause="have_blocks")
        final = self.final if self.state is LeaseState.COMPLETE else None
        return Announced(first_block, tuple(block for block, _ in blocks), tuple(generation for _, generation in blocks), final)


class LeaseTable:
    """All leases of one prefill incarnation, bounded in number; ended ones go to `take_settled`, then become tombstones.

    lease_s: a complete lease expires this long after the last announcement, pull or word of a read.
    handshake_s: how long a Pull waits for its request.
    Tombstones: at most max_tombstones (the oldest goes first), kept tombstone_s, which should outlive a request.
    max_links: so many Pulls may be open at a time; fewer than leases, so that Pulls of unknown numbers leave room for requests.
    """

    def __init__(
        self,
        *,
        lease_s: float,
        handshake_s: float,
        max_leases: int = 4096,
        max_links: int = 2048,
        max_tombstones: int = 8192,
        tombstone_s: float = 600.0,
    ) -> None:
        self.lease_s = lease_s
        self.handshake_s = handshake_s
        self.max_leases = max_leases
        self.max_links = max_links
        self.num_links = 0
        self.max_tombstones = max_tombstones
        self.tombstone_s = tombstone_s
        self._leases: dict[int, Lease] = {}
        self._settled: list[Lease] = []
        self._tombstones: OrderedDict[int, tuple[float, LeaseState]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, number: int) -> Lease | None:
        """The lease if it has not settled."""
        return self._leases.get(number)

    def numbers(self) -> tuple[int, ...]:
        """All leases that have not settled."""
        return tuple(self._leases)

    def open(self, number: int, now_s: float, request_deadline_s: float = math.inf) -> Lease:
        """The request has come. Raises LeaseLost if the number was cancelled or used before, ResourceExhausted if the table is full."""
        self._refuse_dead(number, now_s)
        lease = self._leases.get(number) or self._create(number)
        if lease.state is not LeaseState.EXPECTED:
            raise InvalidRequest(f"lease number {number} is in use", stage="prefill", cause="lease_number")
        lease.apply(LeaseEvent.OPEN)
        lease.opened = True
        lease.request_deadline_s = lease.deadline_s = request_deadline_s
        return lease

    def accept(self, number: int) -> None:
        """A decode group has reserved room for the reader; too late is no error, and too early counts for nothing: the scheduler of
        prompts, which must be of one mind with this table, does not know the lease yet."""
        lease = self._leases.get(number)
        if lease and lease.opened:
            lease.accepted = True

    def pull(self, number: int, attempt: int, now_s: float) -> Lease:
        """A link opens and fences all with lower attempts. Raises LeaseLost if it is fenced itself or the lease is gone.

        ResourceExhausted for more links or leases than may be, InvalidRequest for an attempt that cannot be.
        """
        if attempt < 1:
            raise InvalidRequest("attempts are counted from 1", stage="pull", cause="attempt")
        if self.num_links >= self.max_links:
            raise ResourceExhausted(f"{self.max_links} Pulls are open", stage="pull", cause="pulls", retry_after_s=1.0)
        self._refuse_dead(number, now_s)
        lease = self._leases.get(number)
        if lease is None:
            lease = self._create(number)
            lease.deadline_s = now_s + self.handshake_s
        self._refuse_fenced(lease, attempt)
        lease.attempt = attempt
        lease.links.add(attempt)
        self.num_links += 1
        self._touch(lease, now_s)
        return lease

    def announce(
        self, number: int, first_block: int, blocks: Sequence[tuple[int, int]], now_s: float, final: FinalToken | None = None
    ) -> bool:
        """More (block id, generation) pairs are readable, the last ones with `final`; False if the lease has ended meanwhile."""
        lease = self._leases.get(number)
        if lease is None or lease.state.ended:
            return False
        assert first_block == len(lease.blocks), "announcements follow each other without gap or overlap"
        lease.apply(LeaseEvent.FINISH if final else LeaseEvent.ANNOUNCE)
        lease.blocks += blocks
        lease.final = final
        self._touch(lease, now_s)
        return True

    def release(self, number: int, attempt: int, now_s: float) -> Lease:
        """All reads of `attempt` have ended well. Counts for the highest attempt only; raises LeaseLost or InvalidRequest otherwise."""
        self._refuse_dead(number, now_s)
        lease = self._leases.get(number)
        if lease is None or attempt not in lease.links:
            raise LeaseLost(f"attempt {attempt} has no open Pull on lease {number}", stage="pull")
        if attempt != lease.attempt or lease.state.ended:
            raise LeaseLost(f"lease {number} is {lease.state.value}, attempt {attempt} is fenced by {lease.attempt}", stage="pull")
        if lease.state is not LeaseState.COMPLETE:
            raise InvalidRequest(f"lease {number} is still {lease.state.value}: its final announcement was not read", stage="pull")
        self._unlink(lease, attempt)  # the release says that its reads have ended, before its stream does
        self._end(lease, LeaseEvent.RELEASE, now_s)
        return lease

    def read(self, number: int, attempt: int, now_s: float) -> None:
        """The newest link is still reading: the lease is counted from now. What others say is late."""
        lease = self._leases.get(number)
        if lease is not None and attempt in lease.links and attempt == lease.attempt:
            self._touch(lease, now_s)

    def close(self, number: int, attempt: int, now_s: float) -> None:
        """A link has closed: its reads have ended, or its peer is dead or fenced for good."""
        lease = self._leases.get(number)
        if lease is None or attempt not in lease.links:
            return
        self._unlink(lease, attempt)
        lease.accepted &= bool(lease.links)  # whoever had room for the reader read it no further
        self._touch(lease, now_s)
        self._settle(lease, now_s)

    def rewind(self, number: int) -> bool:
        """Take the blocks back if no decode counts on them: the lease is open, and nothing has been announced."""
        lease = self._leases.get(number)
        if lease is None or not lease.revocable:
            return False
        lease.apply(LeaseEvent.REWIND)
        lease.blocks, lease.final = [], None
        lease.deadline_s = lease.request_deadline_s
        return True

    def fail(self, number: int, error: BatonError, now_s: float) -> None:
        """The request ended on prefill without blocks to read (an error, a cancel); links are told and awaited.

        A number never heard of gets a tombstone: whoever comes for it later is refused.
        """
        lease = self._leases.get(number)
        if lease is None and number not in self._tombstones:
            self._entomb(number, LeaseState.FAILED, now_s)
        elif lease and not lease.state.ended:
            lease.error = error
            self._end(lease, LeaseEvent.FAIL, now_s)

    def expire(self, now_s: float) -> list[Lease]:
        """End what is overdue; those that ended."""
        overdue = [lease for lease in self._leases.values() if not lease.state.ended and lease.deadline_s <= now_s]
        for lease in overdue:
            self._end(lease, LeaseEvent.EXPIRE, now_s)
        return overdue

    def next_deadline_s(self) -> float:
        """When `expire` has something to do; infinity if never."""
        return min((lease.deadline_s for lease in self._leases.values() if not lease.state.ended), default=math.inf)

    def take_settled(self) -> list[Lease]:
        """Leases whose blocks may be used again; each is handed out exactly once."""
        settled, self._settled = self._settled, []
        return settled

    def _create(self, number: int) -> Lease:
        if len(self._leases) >= self.max_leases:
            raise ResourceExhausted(f"{self.max_leases} leases are held", stage="prefill", cause="leases", retry_after_s=1.0)
        lease = self._leases[number] = Lease(number, LeaseState.EXPECTED, math.inf)
        return lease

    def _unlink(self, lease: Lease, attempt: int) -> None:
        lease.links.remove(attempt)
        self.num_links -= 1

    def _touch(self, lease: Lease, now_s: float) -> None:
        if lease.state is LeaseState.COMPLETE:
            lease.deadline_s = min(now_s + self.lease_s, lease.request_deadline_s)

    def _end(self, lease: Lease, event: LeaseEvent, now_s: float) -> None:
        lease.apply(event)
        self._settle(lease, now_s)

    def _settle(self, lease: Lease, now_s: float) -> None:
        if not lease.settled:
            return
        del self._leases[lease.number]
        self._settled.append(lease)
        # A request may still come after the first Pull gave up on it: another Pull will read it.
        if lease.opened or lease.state is not LeaseState.EXPIRED:
            self._entomb(lease.number, lease.state, now_s)

    def _entomb(self, number: int, state: LeaseState, now_s: float) -> None:
        self._tombstones[number] = (now_s + self.tombstone_s, state)
        while len(self._tombstones) > self.max_tombstones or self._oldest_until_s() <= now_s:
            self._tombstones.popitem(last=False)

    def _oldest_until_s(self) -> float:
        until_s, _ = next(iter(self._tombstones.values()))
        return until_s

    def _refuse_dead(self, number: int, now_s: float) -> None:
        tombstone = self._tombstones.get(number)
        if tombstone and tombstone[0] > now_s:
            raise LeaseLost(f"lease {number} was {tombstone[1].value}", stage="pull")
        lease = self._leases.get(number)
        if lease and lease.state.ended:
            raise LeaseLost(f"lease {number} was {lease.state.value}", stage="pull") from lease.error

    def _refuse_fenced(self, lease: Lease, attempt: int) -> None:
        if attempt <= lease.attempt:
            raise LeaseLost(f"attempt {attempt} on lease {lease.number} is fenced by attempt {lease.attempt}", stage="pull")
