"""The frames of the tcp transport: little-endian, fixed headers, every count bounded. Pure: bytes in, values out. Knows no sockets.

    reader -> source   Request header | spans: (offset u64, nbytes u64) x num_spans | blocks u64 x n | generations u64 x n
    source -> reader   Reply header(status, nbytes) | the spans' bytes, in order, only if status is OK | Trailer(status)

The first reply header says whether the generations were right before the bytes were sent, the trailer whether they still are after.
A connection carries one request at a time. A request that makes no sense, or has not this pool's nonce, gets no answer but the end of
the connection.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np

from baton.errors import BatonError, Incompatible, InternalError, InvalidRequest, LeaseLost
from kv_transfer.transport import NONCE_BYTES, Check, Int64, Spans

MAGIC = b"BtnK"
VERSION = 1
MAX_SPANS = 2**16
MAX_BLOCKS = 2**16
REQUEST = struct.Struct(f"<4sHH{NONCE_BYTES}sII")  # magic, version, flags (0), nonce, num_spans, num_blocks
REPLY = struct.Struct("<4sHHQ")  # magic, version, status, nbytes that follow
TRAILER = struct.Struct("<4sI")  # magic, status


class Status(enum.IntEnum):
    """How the source answers."""

    OK = 0
    STALE = 1  # a block holds other content than announced, or the pool was given up
    BAD_SPAN = 2  # bytes outside of the pool

    def error(self) -> BatonError:
        """What the reader's caller gets."""
        return {
            Status.OK: InternalError("the source says OK", stage="pull"),
            Status.STALE: LeaseLost("a source block holds other content than announced", stage="pull", cause="generation"),
            Status.BAD_SPAN: InvalidRequest("the source's pool has no such bytes", stage="pull", cause="span"),
        }[self]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One read of one connection: bytes of the source's data at offsets [num_spans], if blocks hold what `check` says."""

    nonce: bytes
    offsets: Int64
    nbytes: Int64
    check: Check

    @property
    def total_bytes(self) -> int:
        """Bytes that a good answer carries."""
        return int(self.nbytes.sum())

    def pack(self) -> bytes:
        """The whole frame."""
        assert len(self.offsets) <= MAX_SPANS and len(self.check.blocks) <= MAX_BLOCKS
        header = REQUEST.pack(MAGIC, VERSION, 0, self.nonce, len(self.offsets), len(self.check.blocks))
        pairs = np.stack([self.offsets, self.nbytes], axis=1)
        return (
            header
            + pairs.astype("<i8").tobytes()
            + self.check.blocks.astype("<i8").tobytes()
            + self.check.generations.astype("<u8").tobytes()
        )

    def fits(self, data_bytes: int) -> bool:
        """Whether all spans lie within a pool of that size, and are not more than it."""
        if not len(self.offsets):
            return True
        sane = bool((self.offsets >= 0).all() and (self.nbytes > 0).all() and (self.nbytes <= data_bytes).all())
        return sane and bool((self.offsets <= data_bytes - self.nbytes).all()) and self.total_bytes <= data_bytes


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """The fixed part of a request; says how long the rest is."""

    nonce: bytes
    num_spans: int
    num_blocks: int

    @classmethod
    def unpack(cls, raw: bytes | bytearray) -> RequestHeader:
        """Raises Incompatible if it is no request of this version, or claims more than is allowed."""
        magic, version, flags, nonce, num_spans, num_blocks = REQUEST.unpack(raw)
        if magic != MAGIC or version != VERSION or flags or not 0 < num_spans <= MAX_SPANS or num_blocks > MAX_BLOCKS:
            raise Incompatible("malformed KV read request", stage="pull", cause="frame")
        return cls(nonce, num_spans, num_blocks)

    @property
    def body_bytes(self) -> int:
        """Bytes of the frame after the header."""
        return 16 * self.num_spans + 16 * self.num_blocks

    def request(self, body: bytes | bytearray) -> Request:
        """The request, its body arrived. Values are as the peer wrote them: see Request.fits and Check.stale_block."""
        pairs = np.frombuffer(body, "<i8", 2 * self.num_spans).reshape(-1, 2)
        blocks = np.frombuffer(body, "<i8", self.num_blocks, 16 * self.num_spans)
        generations = np.frombuffer(body, "<u8", self.num_blocks, 16 * self.num_spans + 8 * self.num_blocks)
        return Request(
            self.nonce,
            pairs[:, 0].astype(np.int64),
            pairs[:, 1].astype(np.int64),
            Check(blocks.astype(np.int64), generations.astype(np.uint64)),
        )


def pack_reply(status: Status, nbytes: int) -> bytes:
    """The header of an answer."""
    return REPLY.pack(MAGIC, VERSION, status, nbytes if status is Status.OK else 0)


def unpack_reply(raw: bytes | bytearray, expected_bytes: int) -> Status:
    """The status of an answer; raises Incompatible if it is none, or not of the bytes asked for."""
    magic, version, status, nbytes = REPLY.unpack(raw)
    if magic != MAGIC or version != VERSION or nbytes != (0 if status else expected_bytes):
        raise Incompatible("malformed KV read reply", stage="pull", cause="frame")
    return _status(status)


def pack_trailer(status: Status) -> bytes:
    """The end of an answer."""
    return TRAILER.pack(MAGIC, status)


def unpack_trailer(raw: bytes | bytearray) -> Status:
    """Whether the bytes before it were right to the end; raises Incompatible if it is no trailer."""
    magic, status = TRAILER.unpack(raw)
    if magic != MAGIC:
        raise Incompatible("malformed KV read trailer", stage="pull", cause="frame")
    return _status(status)


def split(spans: Spans, num_lanes: int, min_bytes: int) -> list[Spans]:
    """At most `num_lanes` portions of equal bytes (a span may be cut), each of at least `min_bytes` unless it is the only one."""
    lanes = max(1, min(num_lanes, spans.total_bytes // max(min_bytes, 1)))
    portions, rest = [], spans
    for left in range(lanes, 1, -1):
        portion, rest = cut(rest, rest.total_bytes // left)
        portions.append(portion)
    return [*portions, rest]


def cut(spans: Spans, nbytes: int) -> tuple[Spans, Spans]:
    """The first `nbytes` bytes and the others; 0 < nbytes < all."""
    ends = np.cumsum(spans.nbytes)
    at = int(np.searchsorted(ends, nbytes))  # the span in which the cut falls, or which ends there
    over = int(ends[at]) - nbytes
    head, tail = spans[: at + 1], spans[at:] if over else spans[at + 1 :]
    if over:
        head = Spans(head.source, head.target, np.append(head.nbytes[:-1], head.nbytes[-1] - over))
        keep = int(spans.nbytes[at]) - over
        shift = np.zeros(len(tail), np.int64)
        shift[0] = keep
        tail = Spans(tail.source + shift, tail.target + shift, tail.nbytes - shift)
    return head, tail


def chunked(spans: Spans) -> list[Spans]:
    """Portions that fit a frame."""
    return [spans[at : at + MAX_SPANS] for at in range(0, len(spans), MAX_SPANS)]


def _status(value: int) -> Status:
    if value not in Status._value2member_map_:
        raise Incompatible(f"unknown KV read status {value}", stage="pull", cause="frame")
    return Status(value)
