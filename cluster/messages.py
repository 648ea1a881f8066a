"""What the process that holds a cluster and the one that asked for it say to each other: JSON lines over a pipe.

Knows: shapes only. Written by keeper.py and kept.py; nobody else reads the pipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from baton.config import BatonConfig
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
    Unavailable,
)

_ERRORS: tuple[type[BatonError], ...] = (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    NodeLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)


class Message(BaseModel):
    """One line on the pipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RankInfo(Message):
    """One rank process of the cluster."""

    role: Literal["prefill", "decode"]
    node: str
    rank: int
    pid: int
    host: str
    address: str

    @property
    def name(self) -> str:
        """ "decode-0/1": what people call this rank."""
        return f"{self.node}/{self.rank}"


class ClusterInfo(Message):
    """A running cluster: where clients connect, and which processes it is made of at this moment. router_pid 0: there is no router now."""

    model: str
    http: str
    grpc: str
    router_pid: int
    ranks: tuple[RankInfo, ...]


class Stage(Message):
    """The launch entered a stage."""

    event: Literal["stage"] = "stage"
    stage: str


class Progress(Message):
    """How far one rank has loaded; total_bytes is 0 while it is unknown."""

    event: Literal["progress"] = "progress"
    node: str
    rank: int
    stage: str
    done_bytes: int = 0
    total_bytes: int = 0


class Ready(Message):
    """The cluster serves."""

    event: Literal["ready"] = "ready"
    info: ClusterInfo


class Facts(Message):
    """A BatonError in transit."""

    kind: str
    message: str
    stage: str = ""
    node: str = ""
    cause: str = ""
    retryable: bool = False

    @classmethod
    def of(cls, error: BatonError) -> Facts:
        """What `error` says."""
        return cls(
            kind=type(error).__name__,
            message=error.message,
            stage=error.stage,
            node=error.node,
            cause=error.cause,
            retryable=error.retryable,
        )

    def error(self) -> BatonError:
        """The error again; InternalError if its class is none that crosses the pipe."""
        kind = next((known for known in _ERRORS if known.__name__ == self.kind), InternalError)
        return kind(self.message, stage=self.stage, node=self.node, cause=self.cause, retryable=self.retryable)


class Failed(Message):
    """The launch failed and everything is being taken down. log: the last lines the rank at fault wrote, if one is."""

    event: Literal["failed"] = "failed"
    error: Facts
    log: str = ""


class Lost(Message):
    """A process of a running cluster ended by itself, or (ended False) is killed because it hangs. `name` is a rank's, or "router"."""

    event: Literal["lost"] = "lost"
    name: str
    pid: int
    reason: str
    ended: bool = True
    log: str = ""

    def said(self) -> str:
        """For people."""
        return f"lost: {self.name} (pid {self.pid}) {'ended' if self.ended else 'hangs'}: {self.reason}"


class Rebuilding(Message):
    """A node (or the router, node "router") is being built again, from nothing; why: what ended it."""

    event: Literal["rebuilding"] = "rebuilding"
    node: str
    why: str

    def said(self) -> str:
        """For people."""
        return f"rebuilding {self.node} ({self.why}) ..."


class Waiting(Message):
    """A node cannot be built now. seconds: until the next try; None: it goes on by itself as soon as what it lacks is there."""

    event: Literal["waiting"] = "waiting"
    node: str
    why: str
    seconds: float | None = None

    def said(self) -> str:
        """For people."""
        then = "goes on once it can" if self.seconds is None else f"the next try is in {self.seconds:g} s"
        return f"waiting: {self.node} cannot be built now, {then}: {self.why}"


class Back(Message):
    """A node (or the router) serves again, seconds after it was lost or asked for."""

    event: Literal["back"] = "back"
    node: str
    seconds: float

    def said(self) -> str:
        """For people."""
        return f"back: {self.node} after {self.seconds:.1f} s"


class Retired(Message):
    """An operator had a node drained; its processes have ended and its slots are given back. num_processes: how many they were."""

    event: Literal["retired"] = "retired"
    node: str
    num_processes: int

    def said(self) -> str:
        """For people."""
        return f"retired: {self.node}, {self.num_processes} processes ended"


News = Lost | Rebuilding | Waiting | Back | Retired


class Reply(Message):
    """The answer to the question with this number."""

    event: Literal["reply"] = "reply"
    number: int
    answer: Any = None
    error: Facts | None = None


Event = Annotated[
    Stage | Progress | Ready | Failed | Lost | Rebuilding | Waiting | Back | Retired | Reply,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Launch(Message):
    """The first line to a keeper: what to run, and where it may put files.

    private: start a Ray of its own there. show_logs: what ranks write goes to the keeper's standard error, too.
    """

    config: BatonConfig
    home: str
    private: bool
    show_logs: bool = False


Ask = Literal["status", "counts", "processes", "wind_down"]


class Question(Message):
    """A later line to a keeper. wind_down: take no more requests, answer when those that run are over or had router.drain_s seconds."""

    number: int
    question: Ask
