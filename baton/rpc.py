"""gRPC channels, servers and errors, the same for every service. Knows no service by name.

Every server of ours has a `Door` before its methods: bytes that are no message, and errors that a method raises, end a call with a
status and an ErrorDetail, and what is turned away is counted.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import resource
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
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
from baton.telemetry import Refusals
from baton.v1.inference_pb2 import ErrorDetail
from baton.wire import error_from_message, error_to_message

log = logging.getLogger(__name__)

ERROR_TRAILER = "baton-error-bin"
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_CONNECTIONS = 4096  # to one server; gRPC closes what comes beyond
MAX_CALLS = 8192  # at a time on one server
HANDSHAKE_MS = 10_000  # a connection that has not spoken HTTP/2 by then is closed
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


def make_server(
    max_message_bytes: int = MAX_MESSAGE_BYTES, door: Door | None = None, *, max_connections: int = MAX_CONNECTIONS, idle_s: float = 0.0
) -> grpc.aio.Server:
    """A server for the running event loop, without services and not yet bound.

    A message over max_message_bytes is refused by gRPC itself, with RESOURCE_EXHAUSTED and no ErrorDetail: no method sees it.
    door: default one that logs. idle_s: a connection without a call for so long is closed (its client connects anew when it has one).
    """
    return grpc.aio.server(
        interceptors=(door or Door(Refusals("grpc", log)),),
        options=(
            *_KEEPALIVE,
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.max_allowed_incoming_connections", min(max_connections, descriptors() // 4)),
            ("grpc.max_concurrent_streams", MAX_CALLS),  # on one connection
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            *([("grpc.max_connection_idle_ms", int(1000 * idle_s))] if idle_s else []),
        ),
    )


def descriptors() -> int:
    """How many files and sockets this process may have open: what its servers share."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


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


Reply = TypeVar("Reply")
Behaviour = Callable[[Any, Any], Awaitable[Any]]
Handler = Any  # grpc.RpcMethodHandler, which only type stubs know the parameters of
_OURS = "/baton."
_REFUSALS = frozenset({"INVALID_ARGUMENT", "UNAUTHENTICATED", "NOT_FOUND", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"})
_MAKE: dict[tuple[bool, bool], Callable[..., Handler]] = {  # by whether requests and responses are streams
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Stands before every method of baton.v1 on one server. State owner: the server's loop.

    max_calls: more at a time are refused with ResourceExhausted, but for the services in `always` (health is never counted), which
    stay reachable when the rest is full. A call counts from its start to its end, whatever ends it.
    """

    def __init__(self, refusals: Refusals, *, max_calls: int = MAX_CALLS, always: Sequence[str] = ()) -> None:
        self.num_calls = 0
        self._refusals = refusals
        self._max_calls = max_calls
        self._always = tuple(f"/{service}/" for service in always)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """The method's own handler, behind this door. Unknown methods have none, and gRPC says so."""
        handler: Handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OURS):
            return handler
        return self._guarded(handler, counted=not handler_call_details.method.startswith(self._always))

    def _guarded(self, handler: Handler, counted: bool) -> Handler:
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        assert inspect.iscoroutinefunction(behaviour), "methods write their responses; generators would end when they are collected"

        async def behind_the_door(request: Any, context: Any) -> Any:
            try:
                return await self._carried_out(behaviour, request, context, counted)
            except grpc.aio.InternalError as error:
                # A write to a peer that has just hung up; where the news of that is slower, gRPC would log it as a bug of the method's.
                raise asyncio.CancelledError from error

        make = _MAKE[handler.request_streaming, handler.response_streaming]
        return make(behind_the_door, _decoder(handler), handler.response_serializer)

    async def _carried_out(self, behaviour: Behaviour, request: Any, context: Any, counted: bool) -> Any:
        try:
            if isinstance(request, _Malformed):
                raise request.error
            with self._call(counted):
                return await behaviour(request, context)
        except BatonError as error:
            self._count(error.status, error.cause, error.message)
            await abort(context, error)
        except grpc.aio.AbortError:
            detail = _detail_in(context.trailing_metadata()) or ErrorDetail(cause="refused")
            self._count(context.code().name, detail.cause, context.details())
            raise

    @contextmanager
    def _call(self, counted: bool) -> Iterator[None]:
        if counted and self.num_calls >= self._max_calls:
            raise ResourceExhausted(
                f"{self.num_calls} calls are under way here, at most {self._max_calls} may be", cause="calls", retry_after_s=1.0
            )
        self.num_calls += counted
        try:
            yield
        finally:
            self.num_calls -= counted

    def _count(self, status: str, cause: str, detail: str) -> None:
        if status in _REFUSALS:
            self._refusals.add(cause, detail)


@dataclass(frozen=True, slots=True)
class _Malformed:
    """What came in the place of a request. A stream's iterator raises instead: its method is under way already."""

    error: InvalidRequest


def _decoder(handler: Handler) -> Callable[[bytes], Any]:
    decode: Any = handler.request_deserializer

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError as error:
            refused = InvalidRequest(f"{len(raw)} bytes that are not the message expected here: {error}", cause="malformed")
            if handler.request_streaming:
                raise refused from error
            return _Malformed(refused)

    return decoded


def _detail_in(trailers: object) -> ErrorDetail | None:
    """The ErrorDetail that `abort` has sent; None if there is none that can be read."""
    found = dict(cast("Iterable[tuple[str, bytes]]", trailers or ())).get(ERROR_TRAILER)
    try:
        return None if found is None else ErrorDetail.FromString(found)
    except DecodeError:
        return None


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


def understood(reply: Reply | None, node: str = "") -> Reply:
    """What a peer said. Incompatible if it said nothing, or what cannot be read: gRPC puts None in the place of both."""
    if reply is None:
        raise Incompatible(
            "the peer sends bytes that are not the message expected here; does it speak baton.v1?", node=node, cause="malformed"
        )
    return reply


def to_error(error: grpc.RpcError, *, stage: str = "", node: str = "") -> BatonError:
    """The error a failed call stands for: what the peer said in the trailer, else what the status says."""
    if not isinstance(error, (grpc.aio.AioRpcError, grpc.Call)):
        return InternalError(str(error), stage=stage, node=node)
    kind = _BY_STATUS.get(error.code(), InternalError)
    detail = _detail_in(error.trailing_metadata())
    if detail is not None:
        return error_from_message(detail, kind)
    if node and error.code() in _BROKEN:
        kind = NodeLost
    if kind is ResourceExhausted:
        kind = TooLarge  # gRPC itself said so (ours bring a trailer), which it does where a message is over a limit
    return kind(error.details() or error.code().name, stage=stage, node=node)
