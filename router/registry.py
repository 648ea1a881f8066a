"""Who is in the cluster, as the router sees it: groups, their last word, and which pairs may be used.

Plain state without network or clock; `router/nodes.py` fills it from streams, `router/fleet.py` asks it. A *group* is what the
router addresses: a prefill node, or one data-parallel group of a decode node. A *pair* (prefill node, decode group) is
compared once when both have said who they are, and is used only after a tiny real request has run through it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from baton.errors import Unavailable
from router.compare import refusal
from router.heard import GroupLoad, Hello, PullReport

_MAX_REASONS = 4
_LASTING = 3  # failed proofs in a row before a launch gives up; a fault must not count by its first occurrence


class Role(enum.StrEnum):
    """What a group does."""

    PREFILL = "prefill"
    DECODE = "decode"


class GroupState(enum.StrEnum):
    """joining: not heard from yet; ready: takes work; draining: finishes what it has; gone: its stream is broken.

    refused: it and this router do not understand each other; it is asked again and again, since another may come in its place.
    """

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"
    REFUSED = "refused"


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


@dataclass(slots=True, eq=False)
class Group:
    """One group. Made by `add`, ended by `remove`; between them only the registry changes it.

    sent_sequences, sent_tokens: what was sent since the group last reported its load, which cannot include it yet.
    asked_to_drain: the operator's wish, kept over reconnects and incarnations until the group is removed.
    refusal: why this router cannot work with it, "" if it can; until it says hello in a way that can be understood.
    """

    address: str
    role: Role
    state: GroupState = GroupState.JOINING
    hello: Hello | None = None
    load: GroupLoad = field(default_factory=GroupLoad)
    sent_sequences: int = 0
    sent_tokens: int = 0
    asked_to_drain: bool = False
    refusal: str = ""
    pulls: PullTotals = PullTotals()

    @property
    def number(self) -> int:
        """The data-parallel group within its node."""
        return self.hello.group if self.hello else 0

    @property
    def node(self) -> str:
        """The node's name; its address until it has said it."""
        return self.hello.node if self.hello else self.address

    @property
    def name(self) -> str:
        """ "prefill-0" or "decode-0/1"; the address until the node has said its name."""
        if self.hello is None or self.role is Role.PREFILL:
            return self.node
        return f"{self.hello.node}/{self.hello.group}"

    @property
    def incarnation(self) -> bytes:
        """Of the life it last said hello in; empty before the first."""
        return self.hello.incarnation if self.hello else b""

    @property
    def idle(self) -> bool:
        """Whether nothing of ours is there or on the way, as far as the group has said."""
        return self.load.idle and not self.sent_sequences

    @property
    def up(self) -> bool:
        """Whether it can be talked to."""
        return self.state in (GroupState.READY, GroupState.DRAINING)

    @property
    def ready(self) -> bool:
        """Whether new work may be sent."""
        return self.state is GroupState.READY


@dataclass(slots=True, eq=False)
class Pair:
    """A prefill node and a decode group. mismatch: what they differ in that they must share, "" if in nothing.

    proven ends with the incarnation of either side, or when a pull between them fails. last_error: of the last failed proof.
    lasting_failures: proofs in a row that failed for reasons which a retry should meet again.
    """

    prefill: Group
    decode: Group
    mismatch: str = ""
    proven: bool = False
    last_error: str = ""
    lasting_failures: int = 0

    @property
    def refusal(self) -> str:
        """Why the pair can never be used as these nodes are, "" if it can."""
        return self.prefill.refusal or self.decode.refusal or self.mismatch

    @property
    def trouble(self) -> str:
        """What is wrong with the pair, as far as known: its refusal, or why its last proof failed."""
        return self.refusal or (f"{self.name}: {self.last_error}" if self.last_error else "")

    @property
    def known(self) -> bool:
        """Whether both sides have said who they are."""
        return self.prefill.hello is not None and self.decode.hello is not None

    @property
    def reachable(self) -> bool:
        """Whether both sides take work and may work together."""
        return self.known and not self.refusal and self.prefill.ready and self.decode.ready

    @property
    def lives(self) -> tuple[bytes, bytes]:
        """The incarnations of both sides: a proof counts for these."""
        return self.prefill.incarnation, self.decode.incarnation

    @property
    def usable(self) -> bool:
        """Whether a client's request may be sent through it."""
        return self.proven and self.reachable

    @property
    def name(self) -> str:
        """ "prefill-0 → decode-0/1"."""
        return f"{self.prefill.name} → {self.decode.name}"


class Registry:
    """State owner: the router's loop. Groups are keyed by address, since a name is known only after the first hello."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self._pairs: dict[tuple[str, str], Pair] = {}

    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order they were added."""
        return tuple(self._groups.values())

    def pairs(self) -> tuple[Pair, ...]:
        """All pairs, usable or not."""
        return tuple(self._pairs.values())

    def usable(self) -> Iterator[Pair]:
        """Pairs that a client's request may be sent through now."""
        return (pair for pair in self._pairs.values() if pair.usable)

    def summary(self) -> str:
        """How things stand, in one line for people: "1 of 2 prefill nodes and 0 of 1 decode groups are ready; …", with what is wrong."""
        counts = {role: [group.ready for group in self._groups.values() if group.role is role] for role in Role}
        prefill, decode = (f"{sum(ready)} of {len(ready)} {role}" for role, ready in counts.items())
        proven = sum(pair.usable for pair in self._pairs.values())
        said = f"{prefill} nodes and {decode} groups are ready; {proven} of {len(self._pairs)} pairs are proven and usable"
        wrong = _listed(pair.trouble for pair in self._pairs.values() if not pair.usable)
        return f"{said}: {wrong}" if wrong else said

    def check_possible(self) -> None:
        """Raise Unavailable, with the reasons, if no pair can ever be used as the nodes are; waiting would not help.

        A node that has not said hello yet may still change that, and so may one that takes the place of another.
        """
        refusals = [pair.refusal for pair in self._pairs.values()]
        if refusals and all(refusals):
            reasons = _listed(refusals)
            raise Unavailable(f"no two nodes can work together: {reasons}", stage="router", cause="incompatible", retryable=False)

    def check_provable(self) -> None:
        """Raise Unavailable, with the reasons, if every pair is refused or keeps failing its proof in a way that does not pass."""
        self.check_possible()
        if self._pairs and all(pair.refusal or pair.lasting_failures >= _LASTING for pair in self._pairs.values()):
            reasons = _listed(pair.trouble for pair in self._pairs.values())
            raise Unavailable(f"no pair of nodes passed its proof: {reasons}", stage="router", cause="proof", retryable=False)

    def max_model_len(self) -> int | None:
        """The longest prompt plus answer that every ready group takes, tokens; None if none is ready.

        A group that is refused by all others gets no work, so what it takes does not matter.
        """
        groups = {group for pair in self._pairs.values() if not pair.refusal for group in (pair.prefill, pair.decode)}
        return min((group.hello.max_model_len for group in groups if group.ready and group.hello), default=None)

    def get(self, address: str) -> Group | None:
        """The group at an address."""
        return self._groups.get(address)

    def add(self, role: Role, address: str) -> Group:
        """A group to be met at `address`; the one already there if it has the same role."""
        group = self._groups.setdefault(address, Group(address, role))
        assert group.role is role, f"{address} is a {group.role} group"
        for other in self._groups.values():
            if other.role is not role:
                prefill, decode = (group, other) if role is Role.PREFILL else (other, group)
                self._pairs.setdefault((prefill.address, decode.address), Pair(prefill, decode))
        return group

    def remove(self, address: str) -> None:
        """Forget a group and its pairs."""
        if address in self._groups:
            self._groups.pop(address).state = GroupState.GONE
        self._pairs = {key: pair for key, pair in self._pairs.items() if address not in key}

    def joined(self, group: Group, hello: Hello, load: GroupLoad) -> None:
        """A group said who it is. A new incarnation has to be compared and proven anew; the same one has not."""
        renewed = group.incarnation != hello.incarnation
        group.hello = hello
        group.state, group.refusal = GroupState.READY, ""
        self.loaded(group, load)
        if renewed:
            for pair in self._of(group):
                self._compare(pair)

    def loaded(self, group: Group, load: GroupLoad) -> None:
        """A group's figures changed. One that drains by itself takes no new work, until it says otherwise."""
        group.load = load
        group.sent_sequences = group.sent_tokens = 0
        self._open_or_close(group)

    def lost(self, group: Group) -> None:
        """A group's stream broke; it may come back."""
        group.state = GroupState.GONE

    def refused(self, group: Group, why: str) -> None:
        """A group and this router do not understand each other."""
        group.state, group.refusal = GroupState.REFUSED, why

    def drain(self, node: str) -> tuple[Group, ...]:
        """Send no new work to a node's groups; returns them (none: no such node)."""
        found = tuple(group for group in self._groups.values() if group.node == node)
        for group in found:
            group.asked_to_drain = True
            self._open_or_close(group)  # and nothing else: what was sent a moment ago is not in the group's figures yet
        return found

    @staticmethod
    def _open_or_close(group: Group) -> None:
        if group.up:
            group.state = GroupState.DRAINING if group.asked_to_drain or group.load.draining else GroupState.READY

    def _of(self, group: Group) -> Iterator[Pair]:
        return (pair for pair in self._pairs.values() if group is pair.prefill or group is pair.decode)

    @staticmethod
    def _compare(pair: Pair) -> None:
        pair.proven = False
        pair.last_error, pair.lasting_failures = "", 0
        prefill, decode = pair.prefill.hello, pair.decode.hello
        pair.mismatch = refusal(prefill, decode) if prefill and decode else ""


def _listed(reasons: Iterable[str]) -> str:
    """Each once, the first few of them."""
    said = list(dict.fromkeys(reason for reason in reasons if reason))
    more = len(said) - _MAX_REASONS
    return "; ".join(said[:_MAX_REASONS]) + (f"; and {more} more" if more > 0 else "")
