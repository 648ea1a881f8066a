from baton.v1 import inference_pb2 as _inference_pb2
from baton.v1 import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PullRequests(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[PullRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[PullRequest, _Mapping]]] = ...) -> None: ...

class PullReplies(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[PullReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[PullReply, _Mapping]]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("pull", "open", "release", "progress", "leave")
    PULL_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    pull: int
    open: PullOpen
    release: PullRelease
    progress: PullProgress
    leave: PullLeave
    def __init__(self, pull: _Optional[int] = ..., open: _Optional[_Union[PullOpen, _Mapping]] = ..., release: _Optional[_Union[PullRelease, _Mapping]] = ..., progress: _Optional[_Union[PullProgress, _Mapping]] = ..., leave: _Optional[_Union[PullLeave, _Mapping]] = ...) -> None: ...

class PullOpen(_message.Message):
    __slots__ = ("lease", "attempt", "have_blocks", "protocol_version")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    HAVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    lease: _node_pb2.LeaseId
    attempt: int
    have_blocks: int
    protocol_version: int
    def __init__(self, lease: _Optional[_Union[_node_pb2.LeaseId, _Mapping]] = ..., attempt: _Optional[int] = ..., have_blocks: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class PullProgress(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullRelease(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    def __init__(self, attempt: _Optional[int] = ...) -> None: ...

class PullLeave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("pull", "queued", "announcement", "released", "error")
    PULL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    pull: int
    queued: PullQueued
    announcement: Announcement
    released: Released
    error: _inference_pb2.ErrorDetail
    def __init__(self, pull: _Optional[int] = ..., queued: _Optional[_Union[PullQueued, _Mapping]] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., error: _Optional[_Union[_inference_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class PullQueued(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("first_block", "block_ids", "generations", "final")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    final: FinalToken
    def __init__(self, first_block: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., final: _Optional[_Union[FinalToken, _Mapping]] = ...) -> None: ...

class FinalToken(_message.Message):
    __slots__ = ("output_index", "token_id", "logprob", "finish_reason")
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    output_index: int
    token_id: int
    logprob: _inference_pb2.TokenLogprob
    finish_reason: _inference_pb2.FinishReason
    def __init__(self, output_index: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[_Union[_inference_pb2.TokenLogprob, _Mapping]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
