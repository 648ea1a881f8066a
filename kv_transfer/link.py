"""What a prefill leader keeps of the Pulls that others have with it: each a link, on the line of its puller.

State only, for one event loop: what is done about it, and when, is the business of server.py.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from baton.errors import BatonError
from kv_transfer.lease import Announced, Lease


class PullerLine:
    """One stream of Pulls, by their numbers on it. Made and ended by `TransferService.Pulls`, and with it all links on it."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}
        self.ready: OrderedDict[int, Link] = OrderedDict()  # those that may have something to tell; also links that have closed since
        self.refused: dict[int, BatonError] = {}  # why a Pull was not opened; until told
        self.last_number = 0
        self.over = False
        self.changed = asyncio.Event()

    def refuse(self, pull: int, error: BatonError) -> None:
        """Tell the peer why there is no such Pull."""
        self.refused[pull] = error
        self.changed.set()

    @property
    def num_untold(self) -> int:
        """Pulls whose peer may not know something yet."""
        return len(self.refused) + len(self.ready)

    def hush(self) -> None:
        """Nothing more is to be told."""
        self.refused.clear()
        self.ready.clear()

    def end(self) -> None:
        """Nothing more will be heard."""
        self.over = True
        self.changed.set()


class Link:
    """One Pull. Made by its open, closed by its peer's leave or release, by the end of its stream, or drain_s after the end of its hopes.

    error: why it has none. queued, told: whether the peer was told that, and of the error.
    """

    def __init__(self, line: PullerLine, pull: int, number: int, attempt: int, have_blocks: int) -> None:
        self.pull = pull
        self.number = number
        self.attempt = attempt
        self.queued = self.told = self.released = False
        self.error: BatonError | None = None
        self._line = line
        self._drain: asyncio.TimerHandle | None = None
        self._next_block = have_blocks
        self._all_told = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to be announced."""
        return self.released or self.error is not None

    def wake(self) -> None:
        """There may be something to tell."""
        self._line.ready[self.pull] = self
        self._line.changed.set()

    def end(self, error: BatonError, drain: asyncio.TimerHandle) -> None:
        """Tell the peer no more than this. drain: closes the link at the latest."""
        self.error, self._drain = error, drain
        self.wake()

    def close(self) -> bool:
        """Its peer reads nothing any more; False if it was closed before."""
        if self._drain is not None:
            self._drain.cancel()
        return self._line.links.pop(self.pull, None) is not None

    def hush(self) -> None:
        """Its peer has left and wants to hear no more."""
        self._line.ready.pop(self.pull, None)

    def news(self, lease: Lease | None) -> Announced | None:
        """What the peer has not been told yet. Raises InvalidRequest if it says that it has more than there is."""
        if lease is None or self.over or self._all_told or not lease.opened:
            return None
        announced = lease.announced_from(self._next_block)
        if not announced.block_ids and announced.final is None:
            return None
        self._next_block += len(announced.block_ids)
        self._all_told = announced.final is not None
        return announced
