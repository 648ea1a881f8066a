"""What nodes say, from messages to plain values. Pure conversion: knows no streams and nobody who listens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc

from baton.config import PROTOCOL_VERSION
from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    LeaseLost,
    NodeLost,
    ResourceExhausted,
    Unavailable,
)
from baton.v1 import node_pb2
from baton.wire import counts_from_message, drawn_from_message, error_from_message, token_event_from_message
from router.heard import GroupLoad, Heard, Hello, Layout, PullReport, Rank, SequenceFailed

MAX_NAME_CHARS = 256
MAX_AXES = 8
MAX_RANKS = 1024  # of one group
INCARNATION_BYTES = 16
_KINDS: dict[int, type[BatonError]] = {
    grpc.StatusCode[kind.status].value[0]: kind
    for kind in (InternalError, InvalidRequest, Cancelled, Unavailable, DeadlineExceeded, ResourceExhausted, Incompatible)
}
_KINDS_BY_CAUSE: dict[str, type[BatonError]] = {kind.default_cause: kind for kind in (NodeLost, LeaseLost)}


def heard_from_message(event: node_pb2.NodeEvent) -> Heard:
    """A node's message as plain values. InvalidRequest for a value that this version does not know."""
    hello = event.hello if event.HasField("hello") else None
    load = event.load if event.HasField("load") else (hello.load if hello else None)
    return Heard(
        hello=hello_from_message(hello) if hello else None,
        load=load_from_message(load) if load else None,
        tokens=tuple(token_event_from_message(token) for token in event.tokens),
        drawn=drawn_from_message(event.drawn),
        accepted=tuple((item.request_id, item.attempt) for item in event.accepted),
        failed=tuple(_failed(item) for item in event.errors),
        pulls=_pulls(event.pulls),
        flushed=tuple((item.number, item.blocks) for item in event.flushed),
        known=tuple((item.request_id, item.attempt, item.next_index) for item in event.known),
    )


def hello_from_message(message: node_pb2.NodeHello) -> Hello:
    """Who a node says it is. Incompatible for what no node can be; one of another version may say what it likes, but its version."""
    layout = message.layout
    if message.protocol_version == PROTOCOL_VERSION and (wrong := _problem(message)):
        raise Incompatible(f"{message.node[:MAX_NAME_CHARS]} says hello with {wrong}", stage="router", cause="malformed")
    return Hello(
        node=message.node,
        group=message.group,
        incarnation=message.incarnation,
        protocol_version=message.protocol_version,
        model_fingerprint=message.model_fingerprint,
        dtype=message.dtype,
        quantization=message.quantization,
        max_model_len=message.max_model_len,
        layout=Layout(
            axes=tuple(layout.axes),
            block_size=layout.block_size,
            part_dims=tuple(layout.part_dims),
            dtype=layout.dtype,
            model_num_layers=layout.model_num_layers,
            model_num_kv_heads=layout.model_num_kv_heads,
        ),
        ranks=tuple(Rank(rank.rank, rank.pid, rank.host) for rank in message.ranks),
        transfer_address=message.transfer_address,
    )


def _problem(hello: node_pb2.NodeHello) -> str:
    names = (hello.node, hello.model_fingerprint, hello.dtype, hello.quantization, hello.transfer_address)
    if not hello.node.isprintable() or not hello.node or max(map(len, names)) > MAX_NAME_CHARS:
        return f"a name that is not 1 to {MAX_NAME_CHARS} printable characters"
    if len(hello.incarnation) != INCARNATION_BYTES:
        return f"an incarnation of {len(hello.incarnation)} bytes"
    if not 0 < hello.max_model_len < 2**31:
        return f"max_model_len {hello.max_model_len}"
    if not hello.layout.block_size or len(hello.layout.axes) > MAX_AXES or len(hello.layout.part_dims) > MAX_AXES:
        return "no KV layout that can be"
    return f"{len(hello.ranks)} ranks" if len(hello.ranks) > MAX_RANKS else ""


def load_from_message(message: node_pb2.Load) -> GroupLoad:
    """A group's figures."""
    return GroupLoad(
        waiting_sequences=message.waiting_sequences,
        running_sequences=message.running_sequences,
        waiting_tokens=message.waiting_tokens,
        blocks=counts_from_message(message.blocks),
        open_leases=message.open_leases,
        open_pulls=message.open_pulls,
        steps=message.steps,
        step_seconds=_seconds(message.step_seconds),
        draining=message.draining,
    )


def _failed(message: node_pb2.SequenceError) -> SequenceFailed:
    kind = _KINDS_BY_CAUSE.get(message.error.cause) or _KINDS.get(message.code, InternalError)
    return SequenceFailed(message.request_id, message.attempt, error_from_message(message.error, kind))


def _pulls(messages: Sequence[node_pb2.PullReport]) -> tuple[PullReport, ...]:
    return tuple(
        PullReport(
            request_id=message.request_id,
            attempt=message.attempt,
            blocks_pulled=message.blocks_pulled,
            blocks_matched=message.blocks_matched,
            bytes_pulled=message.bytes_pulled,
            seconds=_seconds(message.seconds),
            exposed_s=_seconds(message.exposed_s),
            transport=message.transport,
        )
        for message in messages
    )


def _seconds(said: float) -> float:
    """A duration that may be added to others: one NaN would be in every sum from then on."""
    return said if 0 <= said < math.inf else 0.0
