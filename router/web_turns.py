"""One packet for what a connection is given in one turn of the event loop: the head of a response and its first event, the last event and
the end, the events of several choices. Knows transports; knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


class Turns:
    """The transports of one loop that hold something. State owner: the loop; what a turn brought is written at the start of the next."""

    def __init__(self) -> None:
        self._held: list[TurnTransport] = []

    def note(self, transport: TurnTransport) -> None:
        """It holds something from now on."""
        if not self._held:
            asyncio.get_running_loop().call_soon(self._flush)
        self._held.append(transport)

    def _flush(self) -> None:
        held, self._held = self._held, []
        for transport in held:
            transport.flush()


class TurnTransport(asyncio.Transport):
    """Holds what is written until the turn is over, and passes everything else on. Ends with the transport under it."""

    def __init__(self, transport: asyncio.Transport, turns: Turns) -> None:
        super().__init__()
        self._transport = transport
        self._turns = turns
        self._held: list[bytes] = []

    def write(self, data: Any) -> None:
        """Write at the end of this turn."""
        if not self._held:
            self._turns.note(self)
        self._held.append(data)

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Write all, at the end of this turn."""
        for data in list_of_data:
            self.write(data)

    def flush(self) -> None:
        """Write now what is held. Of a connection that is closed it is dropped."""
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def close(self) -> None:
        """Write what is held, then close."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._held = []
        self._transport.abort()

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See asyncio."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """See asyncio."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """See asyncio."""
        self._transport.resume_reading()
