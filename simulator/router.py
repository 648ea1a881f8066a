"""The simulated router's process: the production dispatcher behind its production gRPC face, one incarnation after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from baton.config import BatonConfig
from router.dispatch import Dispatcher
from router.notices import Notice
from simulator.network import Network
from simulator.service import serve
from simulator.tokenizer import make_tokenizer

ADDRESS = "router:8001"
LOOK_S = 60.0  # how long one wait for notices lasts


class SimRouter:
    """One life of the router. State owner: the cluster; ends when its process is killed.

    on_notice: whom its supervisor's part tells, in the world. groups: (role, address) of all that it shall meet at first.
    """

    def __init__(
        self,
        network: Network,
        config: BatonConfig,
        chance: random.Random,
        groups: list[tuple[str, str]],
        on_notice: Callable[[Notice], None],
    ) -> None:
        self.process = network.loop.process("router", chance.randrange(1, 100_000))
        self._network = network
        self._config = config
        self._chance = chance
        self._on_notice = on_notice
        self._dispatcher: Dispatcher | None = None
        self.process.do(self._begin, groups)

    @property
    def dispatcher(self) -> Dispatcher:
        """The production dispatcher."""
        assert self._dispatcher is not None, "the process has not started"
        return self._dispatcher

    @property
    def started(self) -> bool:
        """Whether there is a dispatcher."""
        return self._dispatcher is not None

    def add_group(self, role: str, address: str) -> None:
        """As the supervisor asks, in the router's own turn."""
        self.process.do(lambda: self.dispatcher.add_group(role, address))

    def remove_group(self, address: str) -> None:
        """As the supervisor asks, in the router's own turn."""
        self.process.do(lambda: self.process.spawn(self.dispatcher.remove_group(address)))

    def _begin(self, groups: list[tuple[str, str]]) -> None:
        open_channel = self._network.opener(self.process)
        self._dispatcher = Dispatcher(self._config, make_tokenizer(), chance=self._chance, open_channel=open_channel)
        server: Any = self._network.listen(self.process, ADDRESS)
        serve(server, self._dispatcher, self._config.router.slow_client_s)
        self._dispatcher.start()
        for role, address in groups:
            self._dispatcher.add_group(role, address)
        self.process.spawn(self._pass_notices(self._dispatcher))

    async def _pass_notices(self, dispatcher: Dispatcher) -> None:
        while True:
            for notice in await dispatcher.notices.take(LOOK_S):
                self._network.loop.later(0.001, self._on_notice, notice)

    def counted(self) -> dict[str, int]:
        """Retries by cause, as the router's own metrics have them."""
        retries = self._dispatcher.fleet.metrics.retries() if self._dispatcher is not None else {}
        return {f"retries {cause}": count for cause, count in retries.items()}
