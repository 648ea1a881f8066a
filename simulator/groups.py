"""One group of a node in its process: the production leader with its services, on a simulated seat. Lives until its process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

from baton.config import BatonConfig, RankPlan
from baton.errors import BatonError
from decode_node.leader import DecodeLeader
from decode_node.service import add_services as add_decode
from kv_transfer.line import OpenChannel
from prefill_node.leader import PrefillLeader
from prefill_node.service import add_services as add_prefill
from ranks.drive import Drive
from ranks.vigil import Vigil
from simulator.engine import SimSeat
from simulator.network import Network
from simulator.reading import Reaches, SimReader
from simulator.schedule import NodePlan

LAST_WORD_S = 1.0  # what RankLife gives a rank that has failed
Leader = PrefillLeader | DecodeLeader
MakeLeader = Callable[["SimGroup"], Leader]


class SimGroup:
    """State owner: the cluster. Made when its node starts, gone when its node is rebuilt.

    name: as the router calls it. leader: of this life, once its process has started; ended: called when the process has ended by itself.
    """

    def __init__(
        self,
        network: Network,
        node: NodePlan,
        index: int,
        config: BatonConfig,
        address: str,
        chance: random.Random,
        reaches: Callable[[SimGroup], Reaches],
        ended: Callable[[SimGroup, str], None],
    ) -> None:
        self.name = node.group_names()[index]
        self.node = node
        self.address = address
        self.process = network.loop.process(self.name, chance.randrange(1, 100_000))
        plan = RankPlan(config=config, role=node.role, node=node.name, rank=index, threads=1)
        self.seat = SimSeat(plan, node.num_blocks, address, chance.randrange(2, 32_768), node.cost, chance, network.loop.failures.append)
        self.network = network
        self.reader = SimReader(self.seat, reaches(self))
        self._leader: Leader | None = None
        self._ended = ended

    @property
    def leader(self) -> Leader:
        """The production leader."""
        assert self._leader is not None, "the process has not started"
        return self._leader

    @property
    def opener(self) -> OpenChannel:
        """What opens channels in its process."""
        return self.network.opener(self.process)

    def start(self, make_leader: MakeLeader, watch: Callable[[SimGroup], Callable[[], None]]) -> None:
        """Begin in the group's own process. watch: what to look at after each of its events."""
        self.process.do(self._begin, make_leader, watch)

    def _begin(self, make_leader: MakeLeader, watch: Callable[[SimGroup], Callable[[], None]]) -> None:
        self._leader = leader = make_leader(self)
        self.seat.memory.pool = leader.pool
        server: Any = self.network.listen(self.process, self.address)
        if isinstance(leader, PrefillLeader):
            leader.exports = (self.seat.export(),)
            add_prefill(server, leader)
        else:
            add_decode(server, leader)
        self.process.after_event = watch(self)
        self.process.spawn(self._live(leader, leader.drive), self.name)

    def leave(self) -> None:
        """End in an orderly way, in the group's own turn."""
        self.process.do(lambda: self.process.spawn(self._leave()))

    async def _leave(self) -> None:
        """As ranks.node.RankLife.stop."""
        self.leader.drive.close()
        await self.leader.close(None)
        await asyncio.sleep(LAST_WORD_S)
        self._ended(self, "it was told to stop")

    async def _live(self, leader: Leader, drive: Drive) -> None:
        """As ranks.node.RankLife: steps until one fails, then says so and ends the process."""
        watching = asyncio.create_task(Vigil(self.name, drive, (), leader.membership).run())
        try:
            await drive.run()
        except BatonError as error:
            watching.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await leader.close(error)
            await asyncio.sleep(LAST_WORD_S)  # for its last words to be read
            self._ended(self, error.message)


def make_leader(group: SimGroup) -> Leader:
    """The production leader of a group."""
    if group.node.role == "prefill":
        return PrefillLeader(group.seat)
    return DecodeLeader(group.seat, group.reader, open_channel=group.opener)
