"""All links to nodes, and who waits for what comes over them. Carries words between nodes and relays; the policy decides.

It owns the registry and the table of sequences under way, and looks after both once per beat. Every method runs on the router's loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Set

from baton.config import MembershipConfig
from baton.deadline import now_s
from baton.errors import BatonError, Incompatible, NodeLost
from baton.request import TokenEvent
from baton.rpc import open_channel
from baton.telemetry import GroupFigures, PullFigures, RouterMetrics, fields
from router.carrier import Carrier
from router.flush import Flushed, Flushes
from router.group import Group, Pair, Role
from router.heard import GroupLoad, Heard, Hello, PullReport
from router.membership import GroupEvent, GroupState, judge, own_pause
from router.nodes import NodeLink, OpenChannel
from router.notices import Notice, Notices
from router.policy import GroupView, Sharing, choose
from router.registry import Registry

log = logging.getLogger(__name__)


class Fleet:
    """The `Listener` of all links. A carrier is entered when its sequence starts and leaves when it has had its end.

    chance: where all that is drawn comes from, so that a simulation can be run again. incarnation: of this router's life.
    """

    def __init__(
        self,
        metrics: RouterMetrics,
        membership: MembershipConfig,
        sharing: Sharing,
        *,
        chance: random.Random | None = None,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.registry = Registry()
        self.notices = Notices()
        self.flushes = Flushes()
        self.metrics = metrics
        self._refusals = metrics.refusals("control", log)
        self.chance = chance or random.SystemRandom()
        self._membership = membership
        self._sharing = sharing
        self._open_channel = open_channel
        self.incarnation = self.chance.randbytes(16)
        self._links: dict[str, NodeLink] = {}
        self._carriers: dict[str, Carrier] = {}
        self._abandoned: BatonError | None = None
        self._changed = asyncio.Event()
        self._swept_s = 0.0
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def suspect_s(self) -> float:
        """Silence that makes suspicious, seconds."""
        return self._membership.suspect_s

    @property
    def num_carriers(self) -> int:
        """Sequences under way, proofs included."""
        return len(self._carriers)

    def start(self) -> None:
        """Begin to look after groups and sequences, once per beat, until `close`."""
        self._swept_s = now_s()
        self._sweeping = asyncio.create_task(self._sweep_on(), name="sweep")

    def add(self, role: Role, address: str) -> None:
        """Meet a group at `address` and stay connected; nothing if that was already asked."""
        self.registry.add(role, address)
        if address not in self._links:
            link = NodeLink(role, address, self, self.incarnation, self._membership, open_channel=self._open_channel)
            self._links[address] = link
            link.start()

    async def remove(self, address: str) -> None:
        """Forget a group; what was on it goes on elsewhere."""
        link, group = self._links.pop(address, None), self.registry.get(address)
        if link is None or group is None:
            return
        self.registry.remove(address)
        self._forget(group, link, NodeLost(f"{group.name} was removed from the cluster", stage="router", node=group.name))
        await link.close()

    async def close(self) -> None:
        """Remove every group."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])
        for address in tuple(self._links):
            await self.remove(address)

    def link(self, group: Group) -> NodeLink:
        """The link to a group; NodeLost if it was removed."""
        if group.address not in self._links:
            raise NodeLost(f"{group.name} is no longer part of the cluster", stage="router", node=group.name)
        return self._links[group.address]

    def cancel(self, group: Group, request_id: str, attempt: int, reason: str) -> None:
        """End an attempt and all before it on a group, if it is still part of the cluster."""
        link = self._links.get(group.address)
        if link is not None:
            link.cancel(request_id, attempt, reason)

    def enter(self, request_id: str, carrier: Carrier) -> None:
        """From now on `carrier` hears what nodes say about the sequence. Raises what ended all others, if that has been."""
        if self._abandoned is not None:
            raise self._abandoned
        assert request_id not in self._carriers, f"{request_id} is already under way"
        self._carriers[request_id] = carrier

    def abandon_all(self, error: BatonError) -> None:
        """End every sequence and every flush under way with `error`; no other begins."""
        self._abandoned = error
        for carrier in tuple(self._carriers.values()):
            carrier.abandon(error)
        self.flushes.abandon(error)

    def leave(self, request_id: str) -> None:
        """Whatever nodes still say about the sequence is late and dropped."""
        self._carriers.pop(request_id, None)

    def choose(
        self,
        prompt_len: int,
        *,
        avoid: Set[Group] = frozenset(),
        without: Set[Group] = frozenset(),
        prefill: Group | None = None,
    ) -> Pair | None:
        """The usable pair that the policy gives a prompt. avoid: rather not these groups; without: never these.

        prefill: only decode is still to be chosen, since the blocks are there, even if that group takes no new work.
        """
        pairs = {
            (_label(pair.prefill) if pair.prefill else None, _label(pair.decode)): pair
            for pair in self.registry.pairs()
            if (pair.readable(prefill) if prefill else pair.usable) and not any(group in without for group in pair.groups)
        }
        # A prefill group that nobody can work with keeps no decode group from working alone.
        groups = dict.fromkeys(group for pair in self.registry.pairs() if not pair.failing for group in pair.groups)
        names = {_label(group) for group in avoid}
        chosen = choose(
            [view(group) for group in groups],
            tuple(pairs),
            prompt_len,
            avoid=names,
            prefill=_label(prefill) if prefill else None,
            sharing=self._sharing,
        )
        return chosen and pairs[chosen]

    def hand_over(self, groups: Iterable[Group]) -> int:
        """Have all sequences leave these groups and go on elsewhere; how many did."""
        moved: dict[str, None] = {}
        for group in groups:
            moved |= {request_id: None for request_id, carrier in tuple(self._carriers.items()) if carrier.hand_over(group)}
        return len(moved)

    async def flush_cache(self, groups: Iterable[Group], timeout_s: float) -> Flushed:
        """Have groups forget the cached blocks that nobody uses. Raises NodeLost, DeadlineExceeded."""
        return await self.flushes.run([(group.name, self.link(group)) for group in groups], timeout_s)

    async def changed(self, timeout_s: float | None) -> bool:
        """Wait until a group or pair may have changed; False if that took too long. None: the caller has a deadline of its own."""
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for: in Python 3.11 that can swallow a cancellation
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def notify(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def sweep(self, now_s: float) -> None:
        """Judge every group's silence, then have every sequence look after itself. now_s: of the running loop's clock."""
        pause_s = own_pause(now_s, self._swept_s, self._membership.beat_s)
        self._swept_s = now_s
        for group in self.registry.groups():
            link = self._links[group.address]
            link.heard_s = min(now_s, link.heard_s + pause_s)
            self._judge(group, link, now_s)
        for carrier in tuple(self._carriers.values()):
            carrier.look(now_s)

    def heard(self, link: NodeLink, heard: Heard) -> None:
        """Pass on what a node said."""
        group = self._group_of(link)
        if group is None or not (group.up or heard.hello):
            return
        if heard.hello is not None:
            self._met(group, heard.hello, heard.load or GroupLoad())
        else:
            self._loaded(group, heard.load or group.load, link)
        self._accepted(group, heard.accepted)
        self._made(group, heard)
        for failed in heard.failed:
            if carrier := self._carriers.get(failed.request_id):
                carrier.on_failed(group, failed.attempt, failed.error)
        for request_id, attempt, next_index in heard.known:
            if carrier := self._carriers.get(request_id):
                carrier.on_known(group, attempt, next_index)
        for report in heard.pulls:
            self._pulled(group, report)
        for number, blocks in heard.flushed:
            self.flushes.answered(number, blocks)

    def lost(self, link: NodeLink, error: NodeLost) -> None:
        """A node's stream broke. It may be back in a moment, in the same life; what was on it is gone all the same."""
        if error.cause == "malformed":
            self._refusals.add("malformed", error.message)
        group = self._group_of(link)
        if group is not None and group.up:
            self.registry.lost(group, error.message)
            self._forget(group, link, error)

    def refused(self, link: NodeLink, error: Incompatible) -> None:
        """A node and this router do not understand each other, now or still."""
        self._refusals.add(error.cause, error.message)
        group = self._group_of(link)
        if group is not None and not group.up and group.refusal != error.message:
            self.registry.refused(group, error.message)
            log.error("refused a node", extra=fields(group=group.name, address=group.address, why=error.message))
            self.notify()

    def _group_of(self, link: NodeLink) -> Group | None:
        """The group that a link leads to; None if it was removed, though another may be at its address now."""
        return self.registry.get(link.address) if self._links.get(link.address) is link else None

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(self._membership.beat_s)
            try:
                self.sweep(now_s())
            except Exception:  # an edge: whoever judges the others must not fall silent over one of them
                log.exception("a sweep failed for a reason of ours")

    def _judge(self, group: Group, link: NodeLink, now_s: float) -> None:
        settings = self._membership
        event = judge(now_s, link.heard_s, suspect_s=settings.suspect_s, dead_s=settings.dead_s)
        if event is None:
            return
        why = f"{group.name} has said nothing for {settings.dead_s:g} s" + (f": {link.trouble}" if link.trouble and not link.up else "")
        if self.registry.judged(group, event, why):
            log.warning("silent", extra=fields(group=group.name, address=group.address, state=group.state.value))
            if event is GroupEvent.EXPIRE:
                self._condemn(group, link, NodeLost(why, stage="router", node=group.name))
            self.notify()

    def _condemn(self, group: Group, link: NodeLink, error: NodeLost) -> None:
        """Give a group up, its node with it: it is rebuilt as a unit. It is still called, in case that it was only away."""
        link.give_up(error)
        self.notices.put(Notice("condemn", group.node, group.address, error.message))
        self._forget(group, link, error)
        self.hand_over(sibling for sibling in self.registry.of(group.node) if sibling.held_by)

    def _met(self, group: Group, hello: Hello, load: GroupLoad) -> None:
        self.registry.joined(group, hello, load)
        self._report(group)
        log.info("joined", extra=fields(group=group.name, role=group.role, address=group.address))
        for pair in self.registry.pairs():
            if pair.refusal and group in pair.groups:
                log.error("refused a pair", extra=fields(pair=pair.name, why=pair.refusal))
        self.notify()

    def _loaded(self, group: Group, load: GroupLoad, link: NodeLink) -> None:
        # Every step brings a load, so waiters are woken only by what they may wait for.
        before = group.state, group.idle
        sequences, tokens, prompt_tokens = link.unread
        self.registry.loaded(group, load, sent_sequences=sequences, sent_tokens=tokens, sent_prompt_tokens=prompt_tokens)
        self._report(group)
        if before != (group.state, group.idle):
            self.notify()

    def _made(self, group: Group, heard: Heard) -> None:
        """Ends come last: where a message tells of several steps, every token has its turn."""
        ends: list[TokenEvent] = []
        for event in heard.tokens:
            carrier = self._carriers.get(event.request_id)
            if event.finish_reason is not None:
                ends.append(event)
            elif carrier is not None:
                carrier.on_tokens(group, event)
            else:
                self._unwanted(group, event.request_id, event.attempt)
        for request_id, attempt, output_index, token_id in heard.drawn.rows():
            if carrier := self._carriers.get(request_id):
                carrier.on_drawn(group, attempt, output_index, token_id)
            else:
                self._unwanted(group, request_id, attempt)
        for event in ends:
            if carrier := self._carriers.get(event.request_id):
                carrier.on_tokens(group, event)

    def _unwanted(self, group: Group, request_id: str, attempt: int) -> None:
        """A Cancel is under way, or was lost with a stream: say it again."""
        self.cancel(group, request_id, attempt, "nobody waits for it")

    def _accepted(self, group: Group, accepted: Iterable[tuple[str, int]]) -> None:
        for request_id, attempt in accepted:
            if carrier := self._carriers.get(request_id):
                carrier.on_accepted(group, attempt)

    def _pulled(self, group: Group, report: PullReport) -> None:
        group.pulls = group.pulls.plus(report)
        figures = PullFigures(
            num_bytes=report.bytes_pulled,
            pulled_blocks=report.blocks_pulled,
            matched_blocks=report.blocks_matched,
            seconds=report.seconds,
            exposed_s=report.exposed_s,
        )
        self.metrics.pulled(group.node, group.number, figures)

    def _forget(self, group: Group, link: NodeLink, error: NodeLost) -> None:
        self.metrics.forget_group(group.node, group.number)
        for carrier in tuple(self._carriers.values()):
            carrier.on_lost(group, error)
        self.flushes.lost(link, error)
        self.notify()

    def _report(self, group: Group) -> None:
        load = group.load
        figures = GroupFigures(
            waiting=load.waiting_sequences,
            running=load.running_sequences,
            blocks=load.blocks,
            leases=load.open_leases,
            pulls_open=load.open_pulls,
            steps=load.steps,
            step_s=load.step_seconds,
        )
        self.metrics.group(group.node, group.number, figures)


def view(group: Group) -> GroupView:
    """A group as the policy sees it."""
    load, blocks = group.load, group.load.blocks
    return GroupView(
        name=_label(group),
        role=group.role.value,
        ready=group.ready,
        draining=group.state is GroupState.DRAINING,
        waiting_sequences=load.waiting_sequences,
        running_sequences=load.running_sequences,
        waiting_tokens=load.waiting_tokens,
        usable_blocks=blocks.free + blocks.cached,
        block_size=group.hello.layout.block_size if group.hello else 0,
        sent_sequences=group.sent_sequences,
        sent_tokens=group.sent_tokens,
        sent_prompt_tokens=group.sent_prompt_tokens,
    )


def _label(group: Group) -> str:
    """Unlike the name alone, unique: two nodes may have one name while one takes the other's place."""
    return f"{group.name} {group.address}"
