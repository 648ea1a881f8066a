"""A group as the router sees it, and a pair of groups that may work together: plain state, without network or clock.

A *group* is what the router addresses: a prefill node, or one data-parallel group of a decode node; its life is
`router/membership.py`'s table. A *pair* (prefill node, decode group), or a decode group *alone*, is compared when it is known who they
are, and is used only after a tiny real request has run through it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from router.heard import GroupLoad, Hello, PullTotals
from router.membership import GROUP_LIFE, UP, GroupState

_LASTING = 3  # failed proofs in a row before a launch gives up; a fault must not count by its first occurrence


class Role(enum.StrEnum):
    """What a group does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class Group:
    """One group. Made by `add`, ended by `remove`; between them only the registry changes it.

    sent_sequences, sent_tokens: what was sent and the group has not taken yet, so that its load cannot include it; sent_prompt_tokens:
    of these tokens, those of prompts that a decode group is to compute itself.
    why: what it was lost, condemned or refused for, "" if it was not; until its next hello. held_by: another group of its node,
    which is silent or lost, "" if none is: ranks that step together wait for it, and a node is rebuilt as a unit anyway.
    """

    address: str
    role: Role
    state: GroupState = GROUP_LIFE.start
    hello: Hello | None = None
    load: GroupLoad = field(default_factory=GroupLoad)
    sent_sequences: int = 0
    sent_tokens: int = 0
    sent_prompt_tokens: int = 0
    why: str = ""
    held_by: str = ""
    pulls: PullTotals = field(default_factory=PullTotals)

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
        return self.state in UP

    @property
    def ready(self) -> bool:
        """Whether new work may be sent."""
        return self.state is GroupState.READY and not self.held_by

    @property
    def refusal(self) -> str:
        """Why this router cannot work with it, "" if it can, or if that is not known any more."""
        return self.why if self.state is GroupState.REFUSED else ""

    @property
    def trouble(self) -> str:
        """Why it takes no work although it should, for people; "" if it does."""
        return self.why or (f"{self.name} has to wait for {self.held_by}" if self.held_by else "")


@dataclass(slots=True, eq=False)
class Pair:
    """A prefill node and a decode group; prefill None: a decode group *alone*, which computes prompts itself.

    mismatch: what they differ in that they must share, "" if in nothing. proven ends with the incarnation of either side, or when
    a pull between them fails. last_error: of the last failed proof. lasting_failures: proofs in a row that failed for reasons
    which a retry should meet again.
    """

    prefill: Group | None
    decode: Group
    mismatch: str = ""
    proven: bool = False
    last_error: str = ""
    lasting_failures: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        """The one or two groups of it."""
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    @property
    def refusal(self) -> str:
        """Why the pair can never be used as these nodes are, "" if it can."""
        return next((group.refusal for group in self.groups if group.refusal), self.mismatch)

    @property
    def trouble(self) -> str:
        """What is wrong with the pair, as far as known: its refusal, or why its last proof failed."""
        return self.refusal or (f"{self.name}: {self.last_error}" if self.last_error else "")

    @property
    def known(self) -> bool:
        """Whether all sides have said who they are."""
        return all(group.hello is not None for group in self.groups)

    @property
    def reachable(self) -> bool:
        """Whether all sides take work and may work together."""
        return self.known and not self.refusal and all(group.ready for group in self.groups)

    @property
    def lives(self) -> tuple[bytes, ...]:
        """The incarnations of all sides: a proof counts for these."""
        return tuple(group.incarnation for group in self.groups)

    @property
    def usable(self) -> bool:
        """Whether a client's request may be sent through it."""
        return self.proven and self.reachable

    @property
    def hopeless(self) -> bool:
        """Whether it is refused, or keeps failing its proof for reasons that do not pass."""
        return bool(self.refusal) or self.lasting_failures >= _LASTING

    @property
    def failing(self) -> bool:
        """Whether nobody can count on it now: it is refused, or its last proof or pull failed."""
        return bool(self.refusal) or (bool(self.last_error) and not self.proven)

    def readable(self, prefill: Group) -> bool:
        """Whether the decode group may read what lies on `prefill` already, be it that this group takes no new work."""
        return self.prefill is prefill and prefill.up and self.proven and not self.refusal and self.decode.ready

    @property
    def name(self) -> str:
        """ "prefill-0 → decode-0/1", or "decode-0/1 alone"."""
        return f"{self.decode.name} alone" if self.prefill is None else f"{self.prefill.name} → {self.decode.name}"

    def compare(self, mismatch: str) -> None:
        """The sides are others than before: what is known of the pair begins anew."""
        self.mismatch, self.proven, self.last_error, self.lasting_failures = mismatch, False, "", 0
