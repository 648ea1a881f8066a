"""The one exception tree.

    BatonError
    ├── InvalidRequest      the client asked for something that cannot be          INVALID_ARGUMENT    400
    ├── Unauthenticated     no key, or a wrong one                                 UNAUTHENTICATED     401
    ├── NotFound            no such model or node                                  NOT_FOUND           404
    ├── TooLarge            the body or message is over a limit                    INVALID_ARGUMENT    413
    ├── ResourceExhausted   full now; says what is full and when to come back      RESOURCE_EXHAUSTED  429
    ├── Cancelled           the client went away or asked to stop                  CANCELLED           499
    ├── Unavailable         no node can serve this now                             UNAVAILABLE         503
    │   ├── NodeLost        a node died or its stream broke
    │   └── LeaseLost       the blocks to pull are gone (revoked, expired, unknown)
    ├── DeadlineExceeded    the request's or a step's deadline has passed          DEADLINE_EXCEEDED   504
    ├── Incompatible        two peers differ in something they must agree on       FAILED_PRECONDITION 409
    ├── ConfigError         the operator's configuration cannot work               FAILED_PRECONDITION 500
    └── InternalError       a bug of ours                                          INTERNAL            500

Every error has one positional message and keyword facts; it survives pickle (Ray carries it between processes).
The mapping to gRPC statuses is in baton/rpc.py, to HTTP in `http_status` here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar


class BatonError(Exception):
    """Something went wrong in a way a user can be told.

    message: what is wrong, with the numbers, and what to do. stage: admission, router, prefill, pull or decode.
    node: the node concerned. cause: a stable word for programs. retryable: whether the same request may succeed later.
    param: the field of the request that is at fault, where one is.
    """

    status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    default_cause: ClassVar[str] = "internal"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        stage: str = "",
        node: str = "",
        cause: str = "",
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        param: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.node = node
        self.cause = cause or self.default_cause
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after_s = retry_after_s
        self.param = param

    def __reduce__(self) -> tuple[Callable[[str], BatonError], tuple[str]]:
        rebuild = partial(
            type(self),
            stage=self.stage,
            node=self.node,
            cause=self.cause,
            retryable=self.retryable,
            retry_after_s=self.retry_after_s,
            param=self.param,
        )
        return rebuild, (self.message,)


class InvalidRequest(BatonError):
    """The client asked for something that cannot be."""

    status = "INVALID_ARGUMENT"
    http_status = 400
    default_cause = "invalid_request"


class Unauthenticated(BatonError):
    """No key, or a wrong one."""

    status = "UNAUTHENTICATED"
    http_status = 401
    default_cause = "invalid_api_key"


class NotFound(BatonError):
    """No such model or node."""

    status = "NOT_FOUND"
    http_status = 404
    default_cause = "not_found"


class TooLarge(InvalidRequest):
    """The body or message is over a limit."""

    http_status = 413
    default_cause = "too_large"


class ResourceExhausted(BatonError):
    """Full now; says what is full and when to come back."""

    status = "RESOURCE_EXHAUSTED"
    http_status = 429
    default_cause = "resource_exhausted"
    default_retryable = True


class Cancelled(BatonError):
    """The client went away or asked to stop."""

    status = "CANCELLED"
    http_status = 499
    default_cause = "cancelled"


class Unavailable(BatonError):
    """No node can serve this now."""

    status = "UNAVAILABLE"
    http_status = 503
    default_cause = "unavailable"
    default_retryable = True


class NodeLost(Unavailable):
    """A node died or its stream broke."""

    default_cause = "node_lost"


class LeaseLost(Unavailable):
    """The blocks to pull are gone: the lease was revoked, has expired or is unknown."""

    default_cause = "lease_lost"


class DeadlineExceeded(BatonError):
    """The request's or a step's deadline has passed."""

    status = "DEADLINE_EXCEEDED"
    http_status = 504
    default_cause = "deadline"
    default_retryable = True


class Incompatible(BatonError):
    """Two peers differ in something they must agree on."""

    status = "FAILED_PRECONDITION"
    http_status = 409
    default_cause = "incompatible"


class ConfigError(BatonError):
    """The operator's configuration cannot work."""

    status = "FAILED_PRECONDITION"
    default_cause = "config"


class InternalError(BatonError):
    """A bug of ours."""
