"""A rank's watch over its lock-step domain: the leader pings the other ranks, and every rank its own steps. Decides to fail, no more.

One rank of a domain that is stopped, cut off or stuck leaves all others waiting in a collective, with event loops that still answer.
So whoever finds it out fails its own rank, says which rank it was, and the node is rebuilt as a unit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from baton.config import MembershipConfig
from baton.deadline import Deadline
from baton.errors import BatonError, InternalError, NodeLost
from ranks.drive import Drive
from ranks.silence import Silence, beats_in


class Pinged(Protocol):
    """Another rank of the domain (see ranks.service.Peer)."""

    @property
    def name(self) -> str:
        """node/rank."""

    async def ping(self, timeout_s: float) -> int:
        """The steps that the rank has done so far. Raises BatonError if it does not answer in time."""


class Vigil:
    """Watches from `run` until that is cancelled, by whoever started it, or has failed the drive.

    peers: the ranks to ping: all others of the domain on a leader, none on a follower. A rank that has yet to answer for the first
    time is loading, and is not judged: whoever starts the node waits for it with a deadline.
    """

    def __init__(self, name: str, drive: Drive, peers: Sequence[Pinged], membership: MembershipConfig) -> None:
        self._name = name
        self._drive = drive
        self._peers = peers
        self._membership = membership

    async def run(self) -> None:
        """Watch; returns when the drive was failed, which a bug in here does too: a rank that nobody watches must not go on."""
        watches = [asyncio.create_task(self._watch_steps()), *(asyncio.create_task(self._watch_peer(peer)) for peer in self._peers)]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            first = next(iter(done))
            bug = first.exception()
            self._drive.fail(InternalError(f"the watch over {self._name} has failed: {bug!r}") if bug else first.result())
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch_peer(self, peer: Pinged) -> NodeLost:
        beat_s = self._membership.beat_s
        silence = Silence(self._membership.dead_beats, judged=False)
        while True:
            beat = Deadline.after(beat_s)
            if silence.beat(await _answers(peer, beat_s)):
                why = f"rank {peer.name} has not answered for {silence.missed * beat_s:g} s ({silence.missed} beats)"
                return NodeLost(why, node=peer.name, cause="rank_silent")
            await asyncio.sleep(beat.left_s())

    async def _watch_steps(self) -> NodeLost:
        beat_s = self._membership.beat_s
        silence = Silence(beats_in(self._membership.stall_s, beat_s))
        before: int | None = None
        while True:
            await asyncio.sleep(beat_s)
            now = self._drive.under_way
            if silence.beat(now is None or now != before):
                why = f"step {now} of rank {self._name} is not done after {self._membership.stall_s:g} s"
                return NodeLost(why, node=self._name, cause="step_stalled")
            before = now


async def _answers(peer: Pinged, within_s: float) -> bool:
    try:
        await peer.ping(within_s)
    except BatonError:
        return False  # counted, and said by the caller once it was one too often
    return True
