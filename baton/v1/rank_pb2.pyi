from baton.v1 import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WakeRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class WakeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SourcesRequest(_message.Message):
    __slots__ = ("prefill_incarnation", "exports")
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPORTS_FIELD_NUMBER: _ClassVar[int]
    prefill_incarnation: bytes
    exports: _containers.RepeatedCompositeFieldContainer[_node_pb2.ExportHandle]
    def __init__(self, prefill_incarnation: _Optional[bytes] = ..., exports: _Optional[_Iterable[_Union[_node_pb2.ExportHandle, _Mapping]]] = ...) -> None: ...

class SourcesReply(_message.Message):
    __slots__ = ("transport",)
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    transport: str
    def __init__(self, transport: _Optional[str] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("lease", "attempt", "source_blocks", "generations", "target_blocks", "time_left_s")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    lease: _node_pb2.LeaseId
    attempt: int
    source_blocks: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    target_blocks: _containers.RepeatedScalarFieldContainer[int]
    time_left_s: float
    def __init__(self, lease: _Optional[_Union[_node_pb2.LeaseId, _Mapping]] = ..., attempt: _Optional[int] = ..., source_blocks: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., target_blocks: _Optional[_Iterable[int]] = ..., time_left_s: _Optional[float] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("bytes_read",)
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    bytes_read: int
    def __init__(self, bytes_read: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...
