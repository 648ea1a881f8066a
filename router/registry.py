"""Who is in the cluster, as the router sees it: groups, their last word, and which pairs may be used.

Plain state without network or clock; `router/nodes.py` fills it from streams, `router/fleet.py` asks it. What groups and pairs are says
`router/group.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from baton.errors import Unavailable
from router.compare import refusal
from router.group import Group, Pair, Role
from router.heard import GroupLoad, Hello
from router.membership import GROUP_LIFE, GroupEvent, GroupState, NodeReport

_MAX_REASONS = 4
_SERVES = (GroupState.READY, GroupState.DRAINING)
_DOWN = (GroupState.SUSPECT, GroupState.GONE, GroupState.DEAD)


class Registry:
    """State owner: the router's loop. Groups are keyed by address, since a name is known only after the first hello.

    reports: what the supervisor last said of each node. A wish to drain is kept by the node's name, over reconnects and rebuilt
    nodes, until it is taken back. _agreed: of the last prefill group that fitted a decode group: who works alone must fit it, too.
    """

    def __init__(self) -> None:
        self.reports: dict[str, NodeReport] = {}
        self._groups: dict[str, Group] = {}
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._alone: dict[str, Pair] = {}
        self._drained: dict[str, None] = {}
        self._agreed: Hello | None = None

    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order they were added."""
        return tuple(self._groups.values())

    def pairs(self) -> tuple[Pair, ...]:
        """All pairs, usable or not; those of a decode group alone come last."""
        return (*self._pairs.values(), *self._alone.values())

    def usable(self) -> Iterator[Pair]:
        """Pairs that a client's request may be sent through now."""
        return (pair for pair in self.pairs() if pair.usable)

    def complete(self) -> bool:
        """Whether a pair of two groups is usable, or a decode group alone in a cluster without prefill: what a launch waits for."""
        return any(pair.usable for pair in self._wanted())

    def summary(self) -> str:
        """How things stand, in one line for people: "1 of 2 prefill nodes and 0 of 1 decode groups are ready; …", with what is wrong."""
        counts = {role: [group.ready for group in self._groups.values() if group.role is role] for role in Role}
        prefill, decode = (f"{sum(ready)} of {len(ready)} {role}" for role, ready in counts.items())
        proven, alone = (sum(pair.usable for pair in pairs.values()) for pairs in (self._pairs, self._alone))
        said = f"{prefill} nodes and {decode} groups are ready; {proven} of {len(self._pairs)} pairs are proven and usable"
        said += f"; decode groups that can serve alone: {alone}" if alone and not proven else ""
        reasons = [report.said for report in self.reports.values()] + [group.trouble for group in self._groups.values()]
        wrong = _listed(reasons + [pair.trouble for pair in self.pairs() if not pair.usable])
        return f"{said}: {wrong}" if wrong else said

    def check_possible(self) -> None:
        """Raise Unavailable, with the reasons, if no pair can ever be used as the nodes are; waiting would not help.

        A node that has not said hello yet may still change that, and so may one that takes the place of another.
        """
        refusals = [pair.refusal for pair in self.pairs()]
        if refusals and all(refusals) and not self._coming():
            raise Unavailable(f"no two nodes can work together: {_listed(refusals)}", stage="router", cause="incompatible", retryable=False)

    def check_provable(self) -> None:
        """Raise Unavailable, with the reasons, if every pair is refused or keeps failing its proof in a way that does not pass."""
        self.check_possible()
        wanted = self._wanted()
        if wanted and all(pair.hopeless for pair in wanted) and not self._coming():
            reasons = _listed(pair.trouble for pair in wanted)
            raise Unavailable(f"no pair of nodes passed its proof: {reasons}", stage="router", cause="proof", retryable=False)

    def max_model_len(self) -> int | None:
        """The longest prompt plus answer that every ready group takes, tokens; None if none is ready.

        A group that is refused by all others gets no work, so what it takes does not matter.
        """
        groups = (group for pair in self.pairs() if not pair.refusal for group in pair.groups)
        return min((group.hello.max_model_len for group in groups if group.ready and group.hello), default=None)

    def get(self, address: str) -> Group | None:
        """The group at an address."""
        return self._groups.get(address)

    def add(self, role: Role, address: str) -> Group:
        """A group to be met at `address`; the one already there if it has the same role."""
        group = self._groups.setdefault(address, Group(address, role))
        assert group.role is role, f"{address} is a {group.role} group"
        if role is Role.DECODE:
            self._alone.setdefault(address, Pair(None, group))
        for other in self._groups.values():
            if other.role is not role:
                prefill, decode = (group, other) if role is Role.PREFILL else (other, group)
                self._pairs.setdefault((prefill.address, decode.address), Pair(prefill, decode))
        return group

    def remove(self, address: str) -> None:
        """Forget a group and its pairs."""
        if address in self._groups:
            self._step(self._groups.pop(address), GroupEvent.REMOVE)
        self._drained.pop(address, None)  # of one that has never said its name: another may come to this address
        self._alone.pop(address, None)
        self._pairs = {key: pair for key, pair in self._pairs.items() if address not in key}

    def joined(self, group: Group, hello: Hello, load: GroupLoad) -> None:
        """A group said who it is. A new incarnation has to be compared and proven anew; the same one has not."""
        renewed = group.incarnation != hello.incarnation
        if group.hello is None and group.address in self._drained:  # asked before it said its name
            self._drained[hello.node] = self._drained.pop(group.address)
        group.hello, group.why = hello, ""
        self._step(group, GroupEvent.HELLO)
        self.loaded(group, load)
        if renewed:
            self._compare(group)

    def loaded(self, group: Group, load: GroupLoad, *, sent_sequences: int = 0, sent_tokens: int = 0, sent_prompt_tokens: int = 0) -> None:
        """A group said its figures, and that it has not taken so much yet. One that drains by itself gets no new work meanwhile."""
        group.load = load
        group.sent_sequences, group.sent_tokens, group.sent_prompt_tokens = sent_sequences, sent_tokens, sent_prompt_tokens
        self.heard(group)

    def heard(self, group: Group) -> None:
        """A group said something. What is late, of a stream that broke, changes nothing."""
        if group.up:
            self._step(group, GroupEvent.HEARD)
            self._open_or_close(group)

    def judged(self, group: Group, event: GroupEvent, why: str) -> bool:
        """A group is silent (SILENT, EXPIRE; see membership.judge); whether that is news. A refusal ends with whoever refused."""
        if not GROUP_LIFE.allows(group.state, event):
            return False
        self._step(group, event)
        if event is GroupEvent.EXPIRE:
            group.why = why
            for pair in (*self._pairs.values(), *self._alone.values()):
                pair.proven &= group not in pair.groups  # should it come back in this life, it has to show that it works
        return True

    def lost(self, group: Group, why: str) -> None:
        """A group's stream broke; it may come back."""
        group.why = why
        self._step(group, GroupEvent.BROKE)

    def refused(self, group: Group, why: str) -> None:
        """A group and this router do not understand each other."""
        group.why = why
        self._step(group, GroupEvent.REFUSE)

    def drain(self, node: str) -> tuple[Group, ...]:
        """Send no new work to a node, in this life and others, until `restore`; returns its groups (none: nothing is done)."""
        return self._wish(node, drained=True)

    def restore(self, node: str) -> tuple[Group, ...]:
        """Take the wish to drain a node back; returns its groups."""
        return self._wish(node, drained=False)

    def drained(self, node: str) -> bool:
        """Whether the wish to drain a node stands."""
        return node in self._drained

    def of(self, node: str) -> tuple[Group, ...]:
        """The groups of a node, in its present life and, for a moment, in the one before."""
        return tuple(group for group in self._groups.values() if group.node == node)

    def _wish(self, node: str, drained: bool) -> tuple[Group, ...]:
        found = self.of(node)
        self._drained.pop(node, None)
        if drained and (found or node in self.reports):
            self._drained[node] = None
        for group in found:
            self._open_or_close(group)  # and nothing else: what was sent a moment ago is not in the group's figures yet
        return found

    def _open_or_close(self, group: Group) -> None:
        closed = group.load.draining or group.node in self._drained
        event = GroupEvent.DRAIN if closed else GroupEvent.OPEN
        if GROUP_LIFE.allows(group.state, event):
            self._step(group, event)

    def _step(self, group: Group, event: GroupEvent) -> None:
        """Every change of state goes through here."""
        before, group.state = group.state, GROUP_LIFE.after(group.state, event)
        if group.state is not before or event is GroupEvent.HELLO:
            self._hold()

    def _hold(self) -> None:
        """Say of every group whether another of its node holds it. One whose place has been taken, by a node of that name, does not."""
        known = [group for group in self._groups.values() if group.hello]
        served = {(_node(group), group.number) for group in known if group.state in _SERVES}
        down = [group for group in known if group.state in _DOWN and (_node(group), group.number) not in served]
        for group in known:
            holding = (other.name for other in down if _node(other) == _node(group) and other.number != group.number)
            group.held_by = next(holding, "")

    def _wanted(self) -> tuple[Pair, ...]:
        return tuple((self._pairs or self._alone).values())

    def _coming(self) -> bool:
        return any(report.coming for report in self.reports.values())

    def _compare(self, group: Group) -> None:
        for pair in self._pairs.values():
            if pair.prefill and group in pair.groups:
                prefill, decode = pair.prefill.hello, pair.decode.hello
                pair.compare(refusal(prefill, decode) if prefill and decode else "")
                self._agreed = prefill if pair.known and not pair.mismatch else self._agreed
        for alone in self._alone.values():
            mismatch = self._mismatch_alone(alone.decode)
            if alone.decode is group or alone.mismatch != mismatch:
                alone.compare(mismatch)

    def _mismatch_alone(self, decode: Group) -> str:
        """A decode group whose model fits no prefill group must not answer in their place when they are away."""
        if decode.hello is None:
            return ""
        if self._agreed is not None:
            return refusal(self._agreed, decode.hello)
        return next((pair.mismatch for pair in self._pairs.values() if pair.decode is decode and pair.mismatch), "")


def _node(group: Group) -> tuple[Role, str]:
    return group.role, group.node


def _listed(reasons: Iterable[str]) -> str:
    """Each once, the first few of them."""
    said = list(dict.fromkeys(reason for reason in reasons if reason))
    more = len(said) - _MAX_REASONS
    return "; ".join(said[:_MAX_REASONS]) + (f"; and {more} more" if more > 0 else "")
