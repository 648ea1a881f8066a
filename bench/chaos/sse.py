"""A streaming POST over HTTP/1.1 as a client makes it that may stop reading or leave without a word. Knows sockets and server-sent events.

A client of our own, since this one has to be able to behave badly: a small receive window, a reset in the middle.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from baton.errors import Unavailable

_MAX_LINE_BYTES = 2**20
_CONNECT_S = 5.0
_SMALL_SEGMENT_BYTES = 536
_DONE = "[DONE]"

Event = tuple[int, dict[str, Any]]


class EventStream:
    """One request and its answer, on a connection of its own. Owner: whoever opened it, who closes it.

    receive_bytes: the size of the socket's receive buffer, where it should be small. Raises Unavailable where nobody answers and where
    the answer breaks off.
    """

    def __init__(self, address: str, receive_bytes: int = 0) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._receive_bytes = receive_bytes
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[Event, None]:
        """(status, JSON) of every event, or of the one body of a refusal. Ends with the stream's [DONE]."""
        try:
            reader = await self._open(path, json.dumps(body).encode(), headers)
            status, streamed = await _read_head(reader)
            if not streamed:
                yield status, json.loads(await reader.read(_MAX_LINE_BYTES))
                return
            async for line in _lines(reader):
                if line.startswith("data: "):
                    if line == f"data: {_DONE}":
                        return
                    yield status, json.loads(line.removeprefix("data: "))
        except (OSError, EOFError, ValueError) as error:
            raise Unavailable(f"the connection broke: {error!r}") from error
        raise Unavailable("the connection ended before the answer did")

    async def _open(self, path: str, body: bytes, headers: Mapping[str, str]) -> asyncio.StreamReader:
        channel = socket.socket()
        channel.setblocking(False)
        if self._receive_bytes:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
            # On loopback segments are so large that the sender's kernel, which reckons in segments, would buffer megabytes.
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL_SEGMENT_BYTES)
        async with asyncio.timeout(_CONNECT_S):
            await asyncio.get_running_loop().sock_connect(channel, (self._host, self._port))
        reader, self._writer = await asyncio.open_connection(sock=channel, limit=self._receive_bytes or _MAX_LINE_BYTES)
        lines = [f"POST {path} HTTP/1.1", f"Host: {self._host}", "Connection: close", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json", *(f"{name}: {value}" for name, value in headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        return reader

    def leave(self) -> None:
        """Reset the connection, as a process that was killed does."""
        assert self._writer is not None, "not connected yet"
        channel: socket.socket = self._writer.get_extra_info("socket")
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        """End the connection. Safe to call at any time."""
        if self._writer is not None:
            self._writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body comes in chunks). Raises EOFError where it breaks off, as reading does everywhere here."""
    first, *headers, _, _ = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    return int(first.split()[1]), b"transfer-encoding: chunked" in headers


async def _lines(reader: asyncio.StreamReader) -> AsyncGenerator[str, None]:
    """The lines of a body in chunks (RFC 9112, section 7.1)."""
    rest = b""
    while length := int(await reader.readuntil(b"\r\n"), 16):
        *whole, rest = (rest + (await reader.readexactly(length + 2))[:-2]).split(b"\n")
        for line in whole:
            yield line.decode()
