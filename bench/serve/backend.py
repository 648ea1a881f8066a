"""What a load needs of a way to reach a server. Two there are: `openai.py` over HTTP, `native.py` over Baton's gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.serve.answers import Answer, Done
from bench.serve.asks import Ask


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what all of them say. url: http(s)://host:port, or host:port for gRPC. sampling: as the API names it."""

    url: str
    model: str
    api_key: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    timeout_s: float = 600.0
    with_text: bool = False


class Backend(Protocol):
    """Sends requests. Every answer passed to `send` is ended, by a fault at the latest after Target.timeout_s, and told to `done`."""

    def prepare(self, ask: Ask, request_id: str) -> Any:
        """Whatever of a request can be made before the clock runs."""

    def send(self, prepared: Any, answer: Answer, done: Done) -> None:
        """Send at once; returns before the answer comes."""

    async def models(self) -> list[str]:
        """Names of what the server serves. Raises Unavailable."""

    async def close(self) -> None:
        """End all connections; answers that have not ended stay as they are."""
