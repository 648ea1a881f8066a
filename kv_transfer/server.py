"""The source's door: the Transfer service of a prefill leader, over its lease table; layouts and exports as messages.

Runs on the leader's loop and decides nothing: the table says what a lease is, this tells it what happened and carries announcements.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import grpc

from baton import rpc
from baton.config import PROTOCOL_VERSION
from baton.deadline import Deadline, now_s
from baton.errors import BatonError, Incompatible, InvalidRequest, LeaseLost, ResourceExhausted, Unavailable
from baton.v1 import node_pb2, transfer_pb2, transfer_pb2_grpc
from baton.wire import error_to_message, finish_to_message, logprob_to_message
from kv_transfer.layout import KVLayout
from kv_transfer.lease import Announced, FinalToken, Lease, LeaseState, LeaseTable
from kv_transfer.line import MAX_WORDS
from kv_transfer.link import Link, PullerLine
from kv_transfer.transport import Export

Context = grpc.aio.ServicerContext[transfer_pb2.PullRequests, transfer_pb2.PullReplies]
MESSAGE_BLOCKS = 2**16  # announced in one message, or little more; a single announcement may be longer


class TransferService(transfer_pb2_grpc.TransferServicer):
    """Leases of one prefill incarnation and the Pulls that read them. One event loop owns it; nothing in it blocks.

    For every number given to `open`, exactly one `on_ended(number, state)` comes, possibly from within the call that ended it: from
    then on nobody reads the blocks. `on_opened(number)`: a decode pulls an opened lease. `on_closed(number)`: its last Pull went
    away without release, nobody reads its blocks now; the lease is held for another one until lease_s have passed.
    drain_s: how long the peer of a fenced or ended lease may take to stop reading before its Pull is closed for it. No Pull
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
        self._links: defaultdict[int, dict[int, Link]] = defaultdict(dict)  # by number and attempt; see Link
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
        """Open Pulls."""
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

    async def Pulls(self, request_iterator: AsyncIterator[transfer_pb2.PullRequests], context: Context) -> None:
        """See transfer.proto. Peers leave a Pull only when their reads have ended: that, or the stream's end, is an acknowledgement."""
        first = await self._first(request_iterator)
        if first is None:
            await rpc.abort(context, InvalidRequest("whoever opens a stream of Pulls opens one", stage="pull", node=self._node))
        line = PullerLine()
        telling = asyncio.create_task(self._tell(line, context))
        listening = asyncio.create_task(self._listen(line, first, request_iterator))
        try:
            await asyncio.wait({telling, listening}, return_when=asyncio.FIRST_COMPLETED)
            self._end_line(line)
            if listening.done() and listening.exception():
                line.hush()
            # Not cancelled before that: a write that is broken off would break off the status, too.
            await asyncio.wait({telling}, timeout=self._drain_s)
        finally:
            self._end_line(line)
            telling.cancel()
            listening.cancel()
            outcomes = await asyncio.gather(telling, listening, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome  # a bug in them is not lost

    async def _first(self, requests: AsyncIterator[transfer_pb2.PullRequests]) -> transfer_pb2.PullRequests | None:
        """What a stream says first, if it does so in time and means a Pull."""
        try:
            async with asyncio.timeout(self._handshake_s):
                message = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            return None
        return message if any(request.HasField("open") for request in message.requests) else None

    async def _listen(self, line: PullerLine, first: transfer_pb2.PullRequests, requests: AsyncIterator[transfer_pb2.PullRequests]) -> None:
        self._heard_all(line, first)
        async for message in requests:
            self._heard_all(line, message)

    def _heard_all(self, line: PullerLine, message: transfer_pb2.PullRequests) -> None:
        if len(message.requests) > MAX_WORDS:
            raise InvalidRequest(f"{len(message.requests)} words in one message; {MAX_WORDS} are the most", stage="pull", node=self._node)
        for request in message.requests:
            self._heard(line, request)
        if line.num_untold > self._table.max_links + MAX_WORDS:
            raise ResourceExhausted("the puller asks, and does not read the answers", stage="pull", node=self._node, cause="unread")

    def _heard(self, line: PullerLine, request: transfer_pb2.PullRequest) -> None:
        link = line.links.get(request.pull)
        try:
            if link is None:
                self._heard_anew(line, request)
            else:
                self._heard_of(link, request)
        except BatonError as error:
            if link is None:
                line.refuse(request.pull, error)
            else:
                self._end_link(link, error)

    def _heard_anew(self, line: PullerLine, request: transfer_pb2.PullRequest) -> None:
        """Of a Pull that is not open: it is opened, or was closed and this is late."""
        is_new = request.pull > line.last_number
        if not request.HasField("open") and is_new:
            raise InvalidRequest("a Pull starts with open", stage="pull")
        if request.HasField("open"):
            if not is_new:
                raise InvalidRequest(f"number {request.pull} was used for a Pull before", stage="pull")
            line.last_number = request.pull
            self._open_link(line, request.pull, request.open)

    def _heard_of(self, link: Link, request: transfer_pb2.PullRequest) -> None:
        match request.WhichOneof("request"):
            case "progress":
                self._table.read(link.number, link.attempt, now_s())  # a later deadline: the timer finds it when it looks
            case "leave":
                self._close_link(link)
                link.hush()
            case "release" if request.release.attempt == link.attempt:
                self._table.release(link.number, link.attempt, now_s())
                link.released = True
                link.wake()
                self._close_link(link)  # the release says that its reads have ended
            case _:
                raise InvalidRequest("after open, a Pull takes only progress, the release of its own attempt, and leave", stage="pull")

    def _open_link(self, line: PullerLine, pull: int, opening: transfer_pb2.PullOpen) -> None:
        if opening.protocol_version != PROTOCOL_VERSION:
            raise Incompatible(f"the puller speaks protocol {opening.protocol_version}, this node {PROTOCOL_VERSION}", stage="pull")
        if opening.lease.prefill_incarnation != self._incarnation:
            raise LeaseLost("the lease is of another incarnation of this node", stage="pull", cause="incarnation")
        number = opening.lease.number
        lease = self._table.pull(number, opening.attempt, now_s())
        link = self._links[number][opening.attempt] = Link(line, pull, number, opening.attempt, opening.have_blocks)
        line.links[pull] = link
        self._changed(number)  # also tells the fenced ones
        if lease.opened:
            self._on_opened(number)

    async def _tell(self, line: PullerLine, context: Context) -> None:
        """Write what the stream's links should know; ends when the line is over and all is told."""
        while True:
            while words := self._words(line):
                await context.write(transfer_pb2.PullReplies(replies=words))
            if line.over:
                return
            await line.changed.wait()  # ended by a lease's deadline, a word of the peer, or its end
            line.changed.clear()

    def _words(self, line: PullerLine) -> list[transfer_pb2.PullReply]:
        """The next message: everything that is to be told, unless that is very much."""
        words = [self._error_reply(error, pull) for pull, error in line.refused.items()]
        line.refused.clear()
        num_blocks = 0
        while line.ready and num_blocks < MESSAGE_BLOCKS:
            link = line.ready.popitem(last=False)[1]
            for word in self._words_of(link):
                word.pull = link.pull
                words.append(word)
                num_blocks += len(word.announcement.block_ids)
        return words

    def _words_of(self, link: Link) -> Iterator[transfer_pb2.PullReply]:
        if not link.queued:
            link.queued = True
            yield transfer_pb2.PullReply(queued=transfer_pb2.PullQueued())
        announced = self._news(link)
        if announced is not None:
            yield transfer_pb2.PullReply(announcement=_announcement_message(announced))
        if link.released:
            yield transfer_pb2.PullReply(released=transfer_pb2.Released())
        elif link.error is not None and not link.told:
            link.told = True
            yield self._error_reply(link.error)

    def _news(self, link: Link) -> Announced | None:
        """What was announced since; a peer that says that it has more than there is ends."""
        try:
            return link.news(self._table.get(link.number))
        except InvalidRequest as error:
            self._end_link(link, error)
            return None

    def _verdict(self, link: Link) -> BatonError | None:
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

    def _end_link(self, link: Link, error: BatonError) -> None:
        """Its peer has nothing to hope for any more, and is told so; the first word counts. Closed when it leaves, or soon."""
        if not link.over:
            link.end(error, asyncio.get_running_loop().call_later(self._drain_s, self._close_link, link))

    def _end_line(self, line: PullerLine) -> None:
        for link in tuple(line.links.values()):
            self._close_link(link)
        line.end()

    def _close_link(self, link: Link) -> None:
        """No read of it is under way any more, or it is fenced for good."""
        if not link.close():
            return
        links = self._links[link.number]
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
        for link in tuple(self._links.get(number, {}).values()):
            link.wake()
            error = self._verdict(link)
            if error is not None:
                self._end_link(link, error)
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

    def _error_reply(self, error: BatonError, pull: int = 0) -> transfer_pb2.PullReply:
        reply = transfer_pb2.PullReply(error=error_to_message(error), pull=pull)
        reply.error.node = error.node or self._node
        return reply


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
