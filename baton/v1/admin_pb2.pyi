from baton.v1 import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("node", "group", "role", "incarnation", "ranks", "load", "state")
    NODE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    node: str
    group: int
    role: str
    incarnation: bytes
    ranks: _containers.RepeatedCompositeFieldContainer[_node_pb2.RankInfo]
    load: _node_pb2.Load
    state: str
    def __init__(self, node: _Optional[str] = ..., group: _Optional[int] = ..., role: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., ranks: _Optional[_Iterable[_Union[_node_pb2.RankInfo, _Mapping]]] = ..., load: _Optional[_Union[_node_pb2.Load, _Mapping]] = ..., state: _Optional[str] = ...) -> None: ...

class PairStatus(_message.Message):
    __slots__ = ("prefill", "decode", "proven", "refusal")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PROVEN_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    prefill: str
    decode: str
    proven: bool
    refusal: str
    def __init__(self, prefill: _Optional[str] = ..., decode: _Optional[str] = ..., proven: bool = ..., refusal: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("ready", "model", "groups", "pairs", "requests_running", "requests_total", "router_pid", "nodes")
    READY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_PID_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    model: str
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    pairs: _containers.RepeatedCompositeFieldContainer[PairStatus]
    requests_running: int
    requests_total: int
    router_pid: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    def __init__(self, ready: bool = ..., model: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ..., pairs: _Optional[_Iterable[_Union[PairStatus, _Mapping]]] = ..., requests_running: _Optional[int] = ..., requests_total: _Optional[int] = ..., router_pid: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("node", "timeout_s", "retire")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    RETIRE_FIELD_NUMBER: _ClassVar[int]
    node: str
    timeout_s: float
    retire: bool
    def __init__(self, node: _Optional[str] = ..., timeout_s: _Optional[float] = ..., retire: bool = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("idle", "handed_over")
    IDLE_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    idle: bool
    handed_over: int
    def __init__(self, idle: bool = ..., handed_over: _Optional[int] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class RestoreReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node", "role", "stage", "why", "lives")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    LIVES_FIELD_NUMBER: _ClassVar[int]
    node: str
    role: str
    stage: str
    why: str
    lives: int
    def __init__(self, node: _Optional[str] = ..., role: _Optional[str] = ..., stage: _Optional[str] = ..., why: _Optional[str] = ..., lives: _Optional[int] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class FlushCacheReply(_message.Message):
    __slots__ = ("groups", "blocks")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    groups: int
    blocks: int
    def __init__(self, groups: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...
