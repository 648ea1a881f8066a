"""The lines of a decode leader to prefill leaders: to each a channel, and on it one stream that all Pulls between the two share.

Knows how words get from a Pull to its source and back, not what they mean. What is said in one turn of the loop goes as one message.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

import grpc

from baton.v1 import transfer_pb2, transfer_pb2_grpc

OpenChannel = Callable[[str], grpc.aio.Channel]
PullsCall = grpc.aio.StreamStreamCall[transfer_pb2.PullRequests, transfer_pb2.PullReplies]
MAX_WORDS = 4096  # said in one message; a source hears no more
# What a Pull hears: the source's words; how the stream broke; or None: it ended, there or here.
Inbox = asyncio.Queue[transfer_pb2.PullReply | grpc.RpcError | None]


def surplus(open_pulls: Mapping[str, int], most: int) -> tuple[str, ...]:
    """The addresses to hang up on so that `most` remain: those without a Pull, least recently used first; fewer if too few are idle.

    open_pulls: number of open Pulls by address, least recently used first. Pure.
    """
    idle = [address for address, num_pulls in open_pulls.items() if not num_pulls]
    return tuple(idle[: max(0, len(open_pulls) - most)])


class Line:
    """A channel to one address, the stream on it, and the Pulls that use them. Ended by `hang_up`.

    The stream begins with the first Pull. When it ends, or the peer is gone, every Pull on it hears so, and nobody may join any more:
    `ended` is told, once, from the line's own task.
    """

    def __init__(self, address: str, channel: grpc.aio.Channel, ended: Callable[[Line], Awaitable[None]]) -> None:
        self.address = address
        self.channel = channel
        self.open_pulls = 0
        self._ended = ended
        self._inboxes: dict[int, Inbox] = {}
        self._last_number = 0
        self._outbox: list[transfer_pb2.PullRequest] = []
        self._to_say = asyncio.Event()
        self._carrying: asyncio.Task[None] | None = None
        self._closed = False

    def join(self) -> tuple[int, Inbox]:
        """A number for one more Pull, and where it will hear; until `leave`."""
        if self._carrying is None:
            call = transfer_pb2_grpc.TransferStub(self.channel).Pulls()
            self._carrying = asyncio.create_task(self._carry(call))
        self._last_number += 1
        inbox = self._inboxes[self._last_number] = Inbox()
        return self._last_number, inbox

    def leave(self, number: int) -> None:
        """This Pull hears nothing more."""
        self._inboxes.pop(number, None)

    def say(self, request: transfer_pb2.PullRequest) -> None:
        """Send this soon, in order. On a line that is over it goes nowhere: the Pull's inbox says so."""
        self._outbox.append(request)
        self._to_say.set()

    async def hang_up(self) -> None:
        """Close stream and channel, once; every Pull still on it hears that it is over."""
        if self._closed:
            return
        self._closed = True
        self._tell_all(None)
        if self._carrying is not None and self._carrying is not asyncio.current_task():
            self._carrying.cancel()
            await asyncio.gather(self._carrying, return_exceptions=True)
        await self.channel.close(None)

    async def _carry(self, call: PullsCall) -> None:
        talking = asyncio.create_task(self._talk(call))
        why = None
        try:
            why = await self._listen(call)
        finally:
            self._tell_all(why)
            call.cancel()
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
        await self._ended(self)

    async def _talk(self, call: PullsCall) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # a call that is over says why when it is read
            while await self._to_say.wait():
                requests, self._outbox = self._outbox[:MAX_WORDS], self._outbox[MAX_WORDS:]
                if not self._outbox:
                    self._to_say.clear()
                await call.write(transfer_pb2.PullRequests(requests=requests))

    async def _listen(self, call: PullsCall) -> grpc.RpcError | None:
        """How the stream broke, None if it just ended."""
        try:
            while isinstance(message := await call.read(), transfer_pb2.PullReplies):
                for reply in message.replies:
                    if reply.pull in self._inboxes:  # else it has left, and the word is late
                        self._inboxes[reply.pull].put_nowait(reply)
        except grpc.RpcError as error:
            return error
        return None

    def _tell_all(self, why: grpc.RpcError | None) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(why)


class Lines:
    """One line per address. A line on which a peer was lost is taken by no further Pull, and closed when its last one ends.

    Of a node that is stopped or cut off nobody hears, and when it comes back it has another address: so at most `most` lines are kept,
    apart from those in use. A line is also closed when a Pull ends and too many are left, and by `close`.
    """

    def __init__(self, open_channel: OpenChannel, most: int) -> None:
        self._open_channel = open_channel
        self._most = most
        self._lines: dict[str, Line] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._lines)

    def take(self, address: str) -> Line:
        """The line to an address, for one more Pull, which gives it back."""
        line = self._lines.pop(address, None) or Line(address, self._open_channel(address), self._drop)
        self._lines[address] = line
        line.open_pulls += 1
        return line

    async def give_back(self, line: Line, *, lost: bool = False) -> None:
        """One Pull has ended; lost: because its peer was."""
        line.open_pulls -= 1
        if lost:
            self._forget(line)
        # All at once, before anybody else runs: one that is still listed while another is closed could be taken by a new Pull.
        for closing in self._superfluous(line):
            await closing.hang_up()

    async def _drop(self, line: Line) -> None:
        """Its stream is over."""
        self._forget(line)
        if not line.open_pulls:
            await line.hang_up()

    def _forget(self, line: Line) -> None:
        if self._lines.get(line.address) is line:
            del self._lines[line.address]

    def _superfluous(self, line: Line) -> list[Line]:
        if self._lines.get(line.address) is not line:
            return [] if line.open_pulls else [line]
        gone = surplus({address: known.open_pulls for address, known in self._lines.items()}, self._most)
        return [self._lines.pop(address) for address in gone]

    async def close(self) -> None:
        """Close all; Pulls end with NodeLost."""
        lines, self._lines = self._lines, {}
        for line in lines.values():
            await line.hang_up()
