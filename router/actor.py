"""The router as an actor: a thin shell that cluster/ wraps for Ray. Everything it can do is RouterServer's."""

from __future__ import annotations

from baton.config import BatonConfig
from baton.telemetry import configure_logging
from router.server import RouterServer


class RouterActor:
    """The router process. `start` comes first, `stop` last."""

    def __init__(self) -> None:
        self._server: RouterServer | None = None

    async def start(self, config: BatonConfig) -> dict[str, str]:
        """Listen; {"http": "host:port", "grpc": "host:port"}. Raises ConfigError, and leaves nothing open then."""
        configure_logging(config.log_level)
        self._server = RouterServer(config)
        try:
            return await self._server.start()
        except BaseException:
            await self.stop()
            raise

    async def add_group(self, role: str, address: str) -> None:
        """Use the group whose leader listens on `address`. role: "prefill" or "decode"."""
        self._started().dispatcher.add_group(role, address)

    async def remove_group(self, address: str) -> None:
        """Forget the group whose leader listened on `address`; its requests go on elsewhere."""
        await self._started().dispatcher.remove_group(address)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a pair is proven; DeadlineExceeded says why none was."""
        await self._started().wait_ready(timeout_s)

    async def status(self) -> dict[str, object]:
        """Groups, pairs and counts of requests, JSON-able."""
        return self._started().dispatcher.status()

    async def stop(self) -> None:
        """End all requests and close all ports."""
        if self._server is not None:
            await self._server.stop()
            self._server = None

    def _started(self) -> RouterServer:
        assert self._server is not None, "start() comes first"
        return self._server
