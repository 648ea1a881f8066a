"""gRPC channels, servers and errors, the same for every service. Knows no service by name and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from baton.errors import (
    BatonError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    NodeLost,
    NotFound,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from baton.v1.inference_pb2 import ErrorDetail
from baton.wire import error_from_message, error_to_message

ERROR_TRAILER = "baton-error-bin"
MAX_MESSAGE_BYTES = 64 * 2**20
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CLIENT_OPTIONS = (
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_BY_STATUS: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: Incompatible,
    grpc.StatusCode.UNIMPLEMENTED: Incompatible,
}


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port` that notices a dead peer by keepalive within 15 s. Plaintext: loopback or trusted networks."""
    return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)


def open_sync_channel(address: str) -> grpc.Channel:
    """The same for blocking callers."""
    return grpc.insecure_channel(address, options=_CLIENT_OPTIONS)


def make_server(max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Server:
    """A server for the running event loop, without services and not yet bound.

    A message over max_message_bytes is refused by gRPC itself, with RESOURCE_EXHAUSTED and no ErrorDetail: no handler sees it.
    """
    return grpc.aio.server(
        options=(
            *_KEEPALIVE,
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        )
    )


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listen on host:port (0: any free one) and return the port. Raises ConfigError if the port is taken."""
    address = join(host, port)
    refused = ConfigError(f"cannot listen on {address} for gRPC; is the port in use? Choose another or 0 for any")
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise refused from error
    if not bound:
        raise refused
    return int(bound)


def join(host: str, port: int) -> str:
    """host:port as URLs and gRPC write it: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Together under 8 KiB, although a status has up to three bytes for one of its text.
_MAX_STATUS_BYTES, _MAX_MESSAGE_BYTES = 1024, 4096
# What gRPC says by itself, without a trailer of ours, when a connection breaks: at once, or in the middle of a stream.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)


class Health:
    """grpc.health.v1 of one server, with reflection of the services named; NOT_SERVING until told otherwise."""

    def __init__(self, server: grpc.aio.Server, services: Sequence[str]) -> None:
        self._services = ("", *services)
        self._servicer = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def set_serving(self, serving: bool) -> None:
        """Say on all services whether requests are welcome."""
        known = health_pb2.HealthCheckResponse
        status = known.SERVING if serving else known.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)


async def abort(context: grpc.aio.ServicerContext, error: BatonError) -> NoReturn:  # type: ignore[type-arg]
    """End a call with the error's status; its facts travel as an ErrorDetail in the trailing metadata.

    A long message is cut: gRPC lets 8 KiB of metadata through, and makes a RESOURCE_EXHAUSTED of its own of what has more.
    """
    detail = error_to_message(error)
    detail.message = _cut(error.message, _MAX_MESSAGE_BYTES)
    status: grpc.StatusCode = grpc.StatusCode[error.status]
    await context.abort(status, _cut(error.message, _MAX_STATUS_BYTES), ((ERROR_TRAILER, detail.SerializeToString()),))
    raise AssertionError("context.abort returned")


def _cut(text: str, most_bytes: int) -> str:
    """The text, or the start of it and an ellipsis, in at most so many bytes of UTF-8."""
    raw = text.encode()
    return text if len(raw) <= most_bytes else raw[: most_bytes - len("…".encode())].decode(errors="ignore") + "…"


def to_error(error: grpc.RpcError, *, stage: str = "", node: str = "") -> BatonError:
    """The error a failed call stands for: what the peer said in the trailer, else what the status says."""
    if not isinstance(error, (grpc.aio.AioRpcError, grpc.Call)):
        return InternalError(str(error), stage=stage, node=node)
    trailer = dict(cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())).get(ERROR_TRAILER)
    if trailer is not None:
        return error_from_message(ErrorDetail.FromString(trailer), _BY_STATUS.get(error.code(), InternalError))
    kind = _BY_STATUS.get(error.code(), InternalError)
    if node and error.code() in _BROKEN:
        kind = NodeLost
    if kind is ResourceExhausted:
        kind = TooLarge  # gRPC itself said so (ours bring a trailer), which it does where a message is over a limit
    return kind(error.details() or error.code().name, stage=stage, node=node)
