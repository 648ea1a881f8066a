"""One router process: dispatcher, gRPC server and HTTP server in one event loop. Knows how they start and end, not what they do."""

from __future__ import annotations

import asyncio
import logging

from baton.config import BatonConfig
from baton.errors import DeadlineExceeded
from baton.rpc import Door, Health, bind, join, make_server
from baton.telemetry import Refusals, fields
from baton.tokenizer import Tokenizer, unapplied_sampling
from router.dispatch import Dispatcher
from router.service import add_services
from router.web import WebServer, create_app, serve

log = logging.getLogger(__name__)

GRACE_S = 2.0
GRPC_IDLE_S = 300.0
SPARE_CALLS = 256  # beside requests that run and wait: those that are being read, checked and refused


class RouterServer:
    """Owner: whoever calls `start`; it must call `stop`, also after a failed `start`."""

    def __init__(self, config: BatonConfig) -> None:
        self._config = config
        self._dispatcher: Dispatcher | None = None
        self._max_calls = config.router.max_running + config.router.max_queue + SPARE_CALLS
        refusals = Refusals("grpc", log, lambda reason: self.dispatcher.fleet.metrics.refused("grpc", reason))
        door = Door(refusals, max_calls=self._max_calls, always=("baton.v1.Admin",))
        self._grpc = make_server(config.router.max_body_bytes, door, idle_s=GRPC_IDLE_S)
        self._web: WebServer | None = None
        self._health: asyncio.Task[None] | None = None

    @property
    def dispatcher(self) -> Dispatcher:
        """What serves the requests, once started."""
        assert self._dispatcher is not None, "start() comes first"
        return self._dispatcher

    async def start(self) -> dict[str, str]:
        """Load the tokenizer and listen; {"http": "host:port", "grpc": "host:port"}. ConfigError for a taken port or a bad checkpoint."""
        config, router = self._config, self._config.router
        tokenizer = await asyncio.to_thread(Tokenizer.load, config.model)
        for asked in unapplied_sampling(config.model):
            log.warning("the model's generation_config.json asks for what is not applied", extra=fields(asked=asked))
        self._dispatcher = Dispatcher(config, tokenizer)
        health = add_services(self._grpc, self._dispatcher, router.api_keys, router.slow_client_s)
        grpc_port = bind(self._grpc, router.host, router.grpc_port)
        await self._grpc.start()
        refusals = self._dispatcher.fleet.metrics.refusals("http", log)
        app = create_app(
            self._dispatcher,
            model_name=config.name,
            api_keys=router.api_keys,
            max_body_bytes=router.max_body_bytes,
            slow_client_s=router.slow_client_s,
            max_exchanges=self._max_calls,
            refusals=refusals,
        )
        self._web, http_port = await serve(app, router.host, router.http_port, refusals=refusals)
        self._dispatcher.start()
        self._health = asyncio.create_task(self._show_health(health), name="health")
        return {"http": join(router.host, http_port), "grpc": join(router.host, grpc_port)}

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the launch is complete (see Registry.complete). DeadlineExceeded says how things stand if it is not by then,
        Unavailable why it never will be.
        """
        if not await self.dispatcher.wait_ready(timeout_s):
            raise DeadlineExceeded(f"not ready after {timeout_s:g} s: {self.dispatcher.fleet.registry.summary()}", stage="router")

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give those that run drain_s seconds, end the rest with an error its client still gets, close all ports.

        While the requests finish the ports are open, and health says that nobody should come.
        """
        if self._dispatcher is not None:
            await self._dispatcher.wind_down(drain_s)
        if self._health is not None:
            self._health.cancel()
            await asyncio.wait([self._health])
        await asyncio.gather(self._grpc.stop(GRACE_S), self._stop_web())
        if self._dispatcher is not None:
            await self._dispatcher.close()

    async def _stop_web(self) -> None:
        if self._web is not None:
            await self._web.stop()

    async def _show_health(self, health: Health) -> None:
        said: bool | None = None
        while True:
            if said != (ready := self.dispatcher.ready()):
                await health.set_serving(ready)
                said = ready
            await self.dispatcher.fleet.changed(self._config.membership.beat_s)
