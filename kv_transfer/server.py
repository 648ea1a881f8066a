"""The source's door: the Transfer service of a prefill leader, over its lease table; layouts and exports as messages.

Runs on the leader's loop and decides nothing: the table says what a lease is, this tells it what happened and carries announcements.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Incompatible, InvalidRequest, LeaseLost, Unavailable
from baton.v1 import node_pb2, transfer_pb2, transfer_pb2_grpc
from baton.wire import error_to_message, finish_to_message, logprob_to_message
from kv_transfer.layout import KVLayout
from kv_transfer.lease import Announced, FinalToken, Lease, LeaseState, LeaseTable
from kv_transfer.transport import Export

Context = grpc.aio.ServicerContext[transfer_pb2.PullRequest, transfer_pb2.PullReply]


class TransferService(transfer_pb2_grpc.TransferServicer):
    """Leases of one prefill incarnation and the Pull streams that read them. One event loop owns it; nothing in it blocks.

    For every number given to `open`, exactly one `on_ended(number, state)` comes, possibly from within the call that ended it: from
    then on nobody reads the blocks. `on_opened(number)`: a decode pulls an opened lease. `on_closed(number)`: its last Pull went
    away without release, nobody reads its blocks now; the lease is held for another one until lease_s have passed.
    drain_s: how long the peer of a fenced or ended lease may take to stop reading before its stream is closed for it. No stream
    outlives its lease by more, whatever its peer does (it may be stopped, and not even take what is written): a read that it has still
    under way finds other generations. max_pulls: more are refused.
    """

    def __init__(
        self,
        incarnation: bytes,
        *,
        on_ended: Callable[[int, LeaseState], None],
        on_opened: Callable[[int], None],
        on_closed: Callable[[int], None],
        node: str = "",
        lease_s: float = 60.0,
        handshake_s: float = 5.0,
        drain_s: float = 30.0,
        max_leases: int = 4096,
        max_pulls: int = 2048,
    ) -> None:
        self._incarnation = incarnation
        self._on_ended = on_ended
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._node = node
        self._handshake_s = handshake_s
        self._drain_s = drain_s
        self._table = LeaseTable(lease_s=lease_s, handshake_s=handshake_s, max_leases=max_leases, max_links=max_pulls)
        self._links: defaultdict[int, dict[int, _Link]] = defaultdict(dict)  # by number and attempt; each ends with its stream
        self._timer: asyncio.TimerHandle | None = None
        self._armed_s = math.inf

    @property
    def num_leases(self) -> int:
        """Leases that have not settled."""
        return len(self._table)

    def leases(self) -> tuple[Lease, ...]:
        """Leases that have not settled, to be looked at and not changed."""
        return tuple(lease for number in self._table.numbers() if (lease := self._table.get(number)))

    @property
    def num_pulls(self) -> int:
        """Open Pull streams."""
        return sum(len(links) for links in self._links.values())

    def open(self, number: int, deadline: Deadline) -> bool:
        """The request has come (computing may start later); True if a Pull waits for it already. `deadline`: the request's.

        Raises LeaseLost if the number was cancelled or used before, InvalidRequest if it is in use, ResourceExhausted if full.
        """
        self._table.open(number, now_s(), deadline.at_s)
        self._changed(number)
        return bool(self._links.get(number))

    def accept(self, number: int) -> None:
        """A decode group has reserved room for the reader: the lease is not revocable any more."""
        self._table.accept(number)

    def announce(self, number: int, first_block: int, blocks: Sequence[tuple[int, int]], final: FinalToken | None = None) -> bool:
        """More (block id, generation) pairs are readable on all ranks, the last with `final`; False if the lease has ended meanwhile."""
        known = self._table.announce(number, first_block, blocks, now_s(), final)
        self._changed(number)
        return known

    def rewind(self, number: int) -> bool:
        """Take the blocks back if no decode counts on them (none accepted, none pulls): all will be announced again, from the first on."""
        return self._table.rewind(number)

    def fail(self, number: int, error: BatonError) -> None:
        """The request ended here without blocks to read (error, cancel). Unknown numbers are remembered: who comes later is refused."""
        self._table.fail(number, error, now_s())
        self._changed(number)

    def close(self, error: BatonError | None = None) -> None:
        """End all leases: the node goes down. Streams end with the server that carries them."""
        for number in self._table.numbers():
            self.fail(number, error or Unavailable("the prefill node is closing", stage="pull", node=self._node))
        if self._timer is not None:
            self._timer.cancel()

    async def Pull(self, request_iterator: AsyncIterator[transfer_pb2.PullRequest], context: Context) -> None:
        """See transfer.proto. Peers close their side only when their reads have ended: the end of the stream is an acknowledgement."""
        opening = await self._opening(request_iterator)
        if opening is None:
            await rpc.abort(context, InvalidRequest("a Pull starts with open", stage="pull", node=self._node))
        try:
            link = self._link(opening)
        except BatonError as error:
            await context.write(self._error_reply(error))
            return
        serving = asyncio.create_task(self._serve(link, context))
        listening = asyncio.create_task(self._listen(request_iterator, link))
        try:
            await link.over.wait()  # at the latest at the lease's own deadline
            await asyncio.wait({listening}, timeout=self._drain_s)
            self._close_link(link)
            await asyncio.wait({serving}, timeout=self._drain_s)
        finally:
            self._close_link(link)
            serving.cancel()
            listening.cancel()
            outcomes = await asyncio.gather(serving, listening, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome  # a bug in them is not lost

    async def _opening(self, requests: AsyncIterator[transfer_pb2.PullRequest]) -> transfer_pb2.PullOpen | None:
        try:
            async with asyncio.timeout(self._handshake_s):
                request = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            return None
        return request.open if request.WhichOneof("request") == "open" else None

    def _link(self, opening: transfer_pb2.PullOpen) -> _Link:
        if opening.protocol_version != PROTOCOL_VERSION:
            raise Incompatible(f"the puller speaks protocol {opening.protocol_version}, this node {PROTOCOL_VERSION}", stage="pull")
        if opening.lease.prefill_incarnation != self._incarnation:
            raise LeaseLost("the lease is of another incarnation of this node", stage="pull", cause="incarnation")
        number = opening.lease.number
        lease = self._table.pull(number, opening.attempt, now_s())
        link = self._links[number][opening.attempt] = _Link(number, opening.attempt, opening.have_blocks)
        self._changed(number)  # also tells the fenced ones
        if lease.opened:
            self._on_opened(number)
        return link

    async def _serve(self, link: _Link, context: Context) -> None:
        """Write what the link should know, until its peer has released, has left, or is told that the lease is over."""
        try:
            await context.write(transfer_pb2.PullReply(queued=transfer_pb2.PullQueued()))
            while not link.over.is_set():
                announced = link.news(self._table.get(link.number))
                if announced is not None:
                    await context.write(transfer_pb2.PullReply(announcement=_announcement_message(announced)))
                else:
                    await link.changed.wait()  # ended by the lease's own deadline at the latest
                    link.changed.clear()
            if link.released:
                await context.write(transfer_pb2.PullReply(released=transfer_pb2.Released()))
            elif link.error is not None:
                await context.write(self._error_reply(link.error))
        finally:
            link.over.set()

    async def _listen(self, requests: AsyncIterator[transfer_pb2.PullRequest], link: _Link) -> None:
        try:
            async for request in requests:
                self._heard(link, request)
        finally:
            link.end()

    def _heard(self, link: _Link, request: transfer_pb2.PullRequest) -> None:
        if request.WhichOneof("request") == "progress":
            self._table.read(link.number, link.attempt, now_s())  # a later deadline: the timer finds it when it looks
            return
        try:
            if request.WhichOneof("request") != "release" or request.release.attempt != link.attempt:
                raise InvalidRequest("after open, a Pull takes only progress and the release of its own attempt", stage="pull")
            self._table.release(link.number, link.attempt, now_s())
            link.released = True
            link.end()
        except BatonError as error:
            link.end(error)
        self._changed(link.number)

    def _verdict(self, link: _Link) -> BatonError | None:
        """Why the link has nothing to hope for any more, if so."""
        lease = self._table.get(link.number)
        if lease is None:
            return LeaseLost(f"lease {link.number} is over", stage="pull")
        if lease.attempt != link.attempt:
            return LeaseLost(
                f"attempt {link.attempt} on lease {link.number} is fenced by attempt {lease.attempt}", stage="pull", cause="fenced"
            )
        if lease.state.ended:
            return lease.error or LeaseLost(f"lease {link.number} was {lease.state.value}", stage="pull", cause=lease.state.value)
        return None

    def _close_link(self, link: _Link) -> None:
        links = self._links.get(link.number, {})
        if links.get(link.attempt) is not link:
            return
        del links[link.attempt]
        if not links:
            del self._links[link.number]
        lease = self._table.get(link.number)
        self._table.close(link.number, link.attempt, now_s())
        self._changed(link.number)
        if lease and lease.opened and not lease.state.ended and not lease.links:
            self._on_closed(link.number)

    def _changed(self, number: int) -> None:
        """Pass on what an event has brought about: to the links, to the node, to the clock."""
        for link in self._links.get(number, {}).values():
            link.changed.set()
            error = self._verdict(link)
            if error is not None:
                link.end(error)
        for lease in self._table.take_settled():
            if lease.opened:
                self._on_ended(lease.number, lease.state)
        changed = self._table.get(number)
        if changed is not None and not changed.state.ended and changed.deadline_s < self._armed_s:
            self._arm(changed.deadline_s)

    def _arm(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_s = at_s
        delay_s = max(0.0, at_s - now_s())
        self._timer = None if at_s == math.inf else asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        overdue = self._table.expire(now_s())
        self._arm(self._table.next_deadline_s())  # first: no listener's bug may stop the clock
        for lease in overdue:
            self._changed(lease.number)

    def _error_reply(self, error: BatonError) -> transfer_pb2.PullReply:
        reply = transfer_pb2.PullReply(error=error_to_message(error))
        reply.error.node = error.node or self._node
        return reply


class _Link:
    """One Pull stream. Made by its open, ended by `TransferService.Pull`, whatever ends that."""

    def __init__(self, number: int, attempt: int, have_blocks: int) -> None:
        self.number = number
        self.attempt = attempt
        self.released = False
        self.error: BatonError | None = None
        self.changed = asyncio.Event()
        self.over = asyncio.Event()  # released, refused, or its peer has left: its reads have ended, or must end now
        self._next_block = have_blocks
        self._all_told = False

    def end(self, error: BatonError | None = None) -> None:
        """Nothing more is to be told but the error, if there is one; the first word counts."""
        if not self.over.is_set():
            self.error = error
        self.over.set()
        self.changed.set()

    def news(self, lease: Lease | None) -> Announced | None:
        """What the peer has not been told yet. One that says that it has more than there is ends."""
        if lease is None or self._all_told or not lease.opened:
            return None
        try:
            announced = lease.announced_from(self._next_block)
        except InvalidRequest as error:
            self.end(error)
            return None
        if not announced.block_ids and announced.final is None:
            return None
        self._next_block += len(announced.block_ids)
        self._all_told = announced.final is not None
        return announced


def layout_message(layout: KVLayout) -> node_pb2.KVLayout:
    """A layout for NodeHello; the inverse is kv_transfer.client.layout_of."""
    return node_pb2.KVLayout(
        axes=layout.axes,
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        layer_start=layout.layer_start,
        num_layers=layout.num_layers,
        part_dims=layout.part_dims,
        head_start=layout.head_start,
        num_heads=layout.num_heads,
        dtype=layout.dtype,
        model_num_layers=layout.model_num_layers,
        model_num_kv_heads=layout.model_num_kv_heads,
    )


def export_message(export: Export) -> node_pb2.ExportHandle:
    """An export for NodeHello; the inverse is kv_transfer.client.export_of."""
    return node_pb2.ExportHandle(
        rank=export.rank,
        layout=layout_message(export.layout),
        host_id=export.host_id,
        shm_socket=export.shm_socket,
        tcp_address=export.tcp_address,
        nonce=export.nonce,
        pool_bytes=export.pool_bytes,
    )


def _announcement_message(announced: Announced) -> transfer_pb2.Announcement:
    return transfer_pb2.Announcement(
        first_block=announced.first_block,
        block_ids=announced.block_ids,
        generations=announced.generations,
        final=None if announced.final is None else _final_message(announced.final),
    )


def _final_message(final: FinalToken) -> transfer_pb2.FinalToken:
    return transfer_pb2.FinalToken(
        output_index=final.output_index,
        token_id=final.token_id,
        logprob=None if final.logprob is None else logprob_to_message(final.logprob),
        finish_reason=finish_to_message(final.finish_reason),
    )
