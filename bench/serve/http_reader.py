"""One HTTP/1.1 response, read as it comes (RFC 9112). Sans I/O: bytes in, body out.

What a load generator needs and no more: chunked bodies, bodies with a length, bodies that end with the connection. No trailers of
interest, no compression (none is asked for).
"""

from __future__ import annotations

from collections.abc import Callable

_MAX_HEAD_BYTES = 64 * 2**10


class ResponseReader:
    """Calls `body` with every piece of the body as it is complete. Raises ValueError for what is no HTTP/1.1 response.

    status: 0 until the head has been read. done: nothing more belongs to this response. reusable: the connection may carry another.
    """

    def __init__(self, body: Callable[[bytes], None]) -> None:
        self.status = 0
        self.done = False
        self.reusable = False
        self._body = body
        self._rest = b""
        self._left: int | None = None  # bytes of a body with a length; None: chunked, or until the end of the connection
        self._chunked = False

    def feed(self, data: bytes) -> None:
        """Take what the socket gave."""
        data = self._rest + data if self._rest else data
        self._rest = b""
        if not self.status:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._wait_for_head(head)
                return
            self._read_head(head)
        if self._chunked:
            self._read_chunks(data)
        elif data and not self.done:
            self._read_plain(data)

    def end(self) -> bool:
        """The connection has ended. Returns whether the response was whole."""
        if not self.done and self.status and not self._chunked and self._left is None:
            self.done = True
        self.reusable = False
        return self.done

    def _wait_for_head(self, head: bytes) -> None:
        if len(head) > _MAX_HEAD_BYTES:
            raise ValueError(f"the response's head is longer than {_MAX_HEAD_BYTES} bytes")
        self._rest = head

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        version, _, status = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise ValueError(f"this is no HTTP/1.1 response: {first[:80]!r}")
        self.status = int(status[:3])
        headers = dict(_header(line) for line in lines)
        self._chunked = headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        length = headers.get(b"content-length")
        self._left = int(length) if length is not None and not self._chunked else None
        closes = headers.get(b"connection", b"").lower() == b"close" or version == b"HTTP/1.0"
        self.reusable = not closes and (self._chunked or self._left is not None)
        self.done = self._left == 0

    def _read_plain(self, data: bytes) -> None:
        if self._left is not None:
            if len(data) > self._left:
                raise ValueError("the response's body is longer than it said")
            self._left -= len(data)
            self.done = self._left == 0
        self._body(data)

    def _read_chunks(self, data: bytes) -> None:
        at = 0
        while not self.done:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            size = _chunk_size(data[at:line_end])
            end = line_end + 2 + size
            if len(data) < end + 2:
                break
            if size:
                self._body(data[line_end + 2 : end])
            elif data[end : end + 2] != b"\r\n":
                raise ValueError("trailers after a chunked body are not understood")
            else:
                self.done = True
            at = end + 2
        self._rest = b"" if self.done else data[at:]


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits.isalnum():  # int() would take a sign, too
        raise ValueError(f"this is no size of a chunk: {line[:40]!r}")
    return int(digits, 16)


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower(), value.strip()
