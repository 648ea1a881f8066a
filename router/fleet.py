"""All links to nodes, and who waits for what comes over them. Carries words between nodes and relays; the policy decides.

It owns the registry and the table of sequences under way. Every method runs on the router's loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Set
from typing import Protocol

from baton.errors import BatonError, Incompatible, NodeLost
from baton.request import TokenEvent
from baton.rpc import open_channel
from baton.telemetry import GroupFigures, PullFigures, RouterMetrics, fields
from router.flush import Flushed, Flushes
from router.heard import GroupLoad, Heard, Hello, PullReport
from router.nodes import NodeLink, OpenChannel
from router.policy import GroupView, choose
from router.registry import Group, GroupState, Pair, Registry, Role

log = logging.getLogger(__name__)


class Carrier(Protocol):
    """Who carries one sequence. Called on the loop; must not block or raise."""

    def on_tokens(self, group: Group, event: TokenEvent) -> None:
        """A node made tokens."""

    def on_accepted(self, group: Group, attempt: int) -> None:
        """A decode group has reserved room."""

    def on_failed(self, group: Group, attempt: int, error: BatonError) -> None:
        """A node ended an attempt without a finish."""

    def on_lost(self, group: Group, error: NodeLost) -> None:
        """A node is gone, with all that was on it."""

    def abandon(self, error: BatonError) -> None:
        """The router goes: end with `error` at once."""


class Fleet:
    """The `Listener` of all links. A carrier is entered when its sequence starts and leaves when it has had its end."""

    def __init__(
        self,
        metrics: RouterMetrics,
        *,
        beat_s: float = 1.0,
        chance: random.Random | None = None,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.registry = Registry()
        self.metrics = metrics
        self._beat_s = beat_s
        self.chance = chance or random.SystemRandom()
        self._open_channel = open_channel
        self._incarnation = self.chance.randbytes(16)
        self._links: dict[str, NodeLink] = {}
        self._carriers: dict[str, Carrier] = {}
        self.flushes = Flushes()
        self._passed_over: set[Group] = set()  # for their silence, when somebody wanted them; until they are heard again
        self._changed = asyncio.Event()

    def add(self, role: Role, address: str) -> None:
        """Meet a group at `address` and stay connected; nothing if that was already asked."""
        self.registry.add(role, address)
        if address not in self._links:
            self._links[address] = NodeLink(role, address, self, self._incarnation, beat_s=self._beat_s, open_channel=self._open_channel)
            self._links[address].start()

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
        """From now on `carrier` hears what nodes say about the sequence."""
        assert request_id not in self._carriers, f"{request_id} is already under way"
        self._carriers[request_id] = carrier

    def abandon_all(self, error: BatonError) -> None:
        """End every sequence and every flush under way with `error`."""
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

        prefill: only decode is still to be chosen, since the blocks are there.
        """
        pairs = {
            (pair.prefill.name, pair.decode.name): pair
            for pair in self.registry.usable()
            if pair.prefill not in without and pair.decode not in without and self._trusts(pair.prefill) and self._trusts(pair.decode)
        }
        groups = {group.name: view(group) for pair in pairs.values() for group in (pair.prefill, pair.decode)}
        names = {group.name for group in avoid}
        chosen = choose(tuple(groups.values()), tuple(pairs), prompt_len, avoid=names, prefill=prefill.name if prefill else None)
        return chosen and pairs[chosen]

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

    def heard(self, link: NodeLink, heard: Heard) -> None:
        """Pass on what a node said."""
        group = self.registry.get(link.address)
        if group is None:
            return
        if heard.hello is not None:
            self._met(group, heard.hello, heard.load or GroupLoad())
        elif heard.load is not None:
            self._loaded(group, heard.load)
        self._accepted(group, heard.accepted)
        for event in heard.tokens:
            self._made(group, event)
        for failed in heard.failed:
            if carrier := self._carriers.get(failed.request_id):
                carrier.on_failed(group, failed.attempt, failed.error)
        for report in heard.pulls:
            self._pulled(group, report)
        for number, blocks in heard.flushed:
            self.flushes.answered(number, blocks)

    def lost(self, link: NodeLink, error: NodeLost) -> None:
        """A node's stream broke."""
        group = self.registry.get(link.address)
        if group is not None:
            self.registry.lost(group)
            self._forget(group, link, error)

    def refused(self, link: NodeLink, error: Incompatible) -> None:
        """A node and this router do not understand each other, now or still."""
        group = self.registry.get(link.address)
        if group is not None and group.refusal != error.message:
            self.registry.refused(group, error.message)
            log.error("refused a node", extra=fields(group=group.name, address=group.address, why=error.message))
            self.notify()

    def _met(self, group: Group, hello: Hello, load: GroupLoad) -> None:
        self.registry.joined(group, hello, load)
        self._report(group)
        log.info("joined", extra=fields(group=group.name, role=group.role, address=group.address))
        for pair in self.registry.pairs():
            if pair.refusal and group in (pair.prefill, pair.decode):
                log.error("refused a pair", extra=fields(pair=pair.name, why=pair.refusal))
        self.notify()

    def _loaded(self, group: Group, load: GroupLoad) -> None:
        # Every step brings a load, so waiters are woken only by what they may wait for.
        before = group.state, group.idle
        self.registry.loaded(group, load)
        self._report(group)
        if group in self._passed_over or before != (group.state, group.idle):
            self._passed_over.discard(group)
            self.notify()

    def _made(self, group: Group, event: TokenEvent) -> None:
        if carrier := self._carriers.get(event.request_id):
            carrier.on_tokens(group, event)
        elif event.finish_reason is None:  # a Cancel is under way, or was lost with a stream: say it again
            self.cancel(group, event.request_id, event.attempt, "nobody waits for it")

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
        self._passed_over.discard(group)
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

    def _trusts(self, group: Group) -> bool:
        if self._links[group.address].suspect:
            self._passed_over.add(group)
            return False
        return True


def view(group: Group) -> GroupView:
    """A group as the policy sees it."""
    load, blocks = group.load, group.load.blocks
    return GroupView(
        name=group.name,
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
    )
