from baton.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouterHello(_message.Message):
    __slots__ = ("protocol_version", "router_incarnation")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    router_incarnation: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., router_incarnation: _Optional[bytes] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("axes", "num_blocks", "block_size", "layer_start", "num_layers", "part_dims", "head_start", "num_heads", "dtype", "model_num_layers", "model_num_kv_heads")
    AXES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PART_DIMS_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    axes: _containers.RepeatedScalarFieldContainer[str]
    num_blocks: int
    block_size: int
    layer_start: int
    num_layers: int
    part_dims: _containers.RepeatedScalarFieldContainer[int]
    head_start: int
    num_heads: int
    dtype: str
    model_num_layers: int
    model_num_kv_heads: int
    def __init__(self, axes: _Optional[_Iterable[str]] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., layer_start: _Optional[int] = ..., num_layers: _Optional[int] = ..., part_dims: _Optional[_Iterable[int]] = ..., head_start: _Optional[int] = ..., num_heads: _Optional[int] = ..., dtype: _Optional[str] = ..., model_num_layers: _Optional[int] = ..., model_num_kv_heads: _Optional[int] = ...) -> None: ...

class ExportHandle(_message.Message):
    __slots__ = ("rank", "layout", "host_id", "shm_socket", "tcp_address", "nonce", "pool_bytes")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    SHM_SOCKET_FIELD_NUMBER: _ClassVar[int]
    TCP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    layout: KVLayout
    host_id: str
    shm_socket: str
    tcp_address: str
    nonce: bytes
    pool_bytes: int
    def __init__(self, rank: _Optional[int] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., host_id: _Optional[str] = ..., shm_socket: _Optional[str] = ..., tcp_address: _Optional[str] = ..., nonce: _Optional[bytes] = ..., pool_bytes: _Optional[int] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("protocol_version", "node", "group", "incarnation", "model_fingerprint", "dtype", "max_model_len", "layout", "ranks", "transfer_address", "exports", "load", "quantization")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXPORTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    node: str
    group: int
    incarnation: bytes
    model_fingerprint: str
    dtype: str
    max_model_len: int
    layout: KVLayout
    ranks: _containers.RepeatedCompositeFieldContainer[RankInfo]
    transfer_address: str
    exports: _containers.RepeatedCompositeFieldContainer[ExportHandle]
    load: Load
    quantization: str
    def __init__(self, protocol_version: _Optional[int] = ..., node: _Optional[str] = ..., group: _Optional[int] = ..., incarnation: _Optional[bytes] = ..., model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., max_model_len: _Optional[int] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., ranks: _Optional[_Iterable[_Union[RankInfo, _Mapping]]] = ..., transfer_address: _Optional[str] = ..., exports: _Optional[_Iterable[_Union[ExportHandle, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., quantization: _Optional[str] = ...) -> None: ...

class RankInfo(_message.Message):
    __slots__ = ("rank", "pid", "host")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    host: str
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class LeaseId(_message.Message):
    __slots__ = ("prefill_incarnation", "number")
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    prefill_incarnation: bytes
    number: int
    def __init__(self, prefill_incarnation: _Optional[bytes] = ..., number: _Optional[int] = ...) -> None: ...

class ResolvedSampling(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids", "num_logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ...) -> None: ...

class SequenceRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_ids", "emitted_ids", "sampling", "time_left_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: ResolvedSampling
    time_left_s: float
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., emitted_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., time_left_s: _Optional[float] = ...) -> None: ...

class PrefillCommand(_message.Message):
    __slots__ = ("hello", "prefill", "accepted", "cancel", "beat", "flush", "check")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    prefill: PrefillRequest
    accepted: DecodeAccepted
    cancel: Cancel
    beat: Beat
    flush: FlushCache
    check: Check
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., accepted: _Optional[_Union[DecodeAccepted, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., flush: _Optional[_Union[FlushCache, _Mapping]] = ..., check: _Optional[_Union[Check, _Mapping]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "lease_number")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceRequest
    lease_number: int
    def __init__(self, sequence: _Optional[_Union[SequenceRequest, _Mapping]] = ..., lease_number: _Optional[int] = ...) -> None: ...

class DecodeAccepted(_message.Message):
    __slots__ = ("lease_number",)
    LEASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    lease_number: int
    def __init__(self, lease_number: _Optional[int] = ...) -> None: ...

class DecodeCommand(_message.Message):
    __slots__ = ("hello", "decode", "cancel", "beat", "flush", "check")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    decode: DecodeRequest
    cancel: Cancel
    beat: Beat
    flush: FlushCache
    check: Check
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., decode: _Optional[_Union[DecodeRequest, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., flush: _Optional[_Union[FlushCache, _Mapping]] = ..., check: _Optional[_Union[Check, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "lease", "transfer_address", "exports")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXPORTS_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceRequest
    lease: LeaseId
    transfer_address: str
    exports: _containers.RepeatedCompositeFieldContainer[ExportHandle]
    def __init__(self, sequence: _Optional[_Union[SequenceRequest, _Mapping]] = ..., lease: _Optional[_Union[LeaseId, _Mapping]] = ..., transfer_address: _Optional[str] = ..., exports: _Optional[_Iterable[_Union[ExportHandle, _Mapping]]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "attempt", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class FlushCache(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class CacheFlushed(_message.Message):
    __slots__ = ("number", "blocks")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    number: int
    blocks: int
    def __init__(self, number: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Check(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Known(_message.Message):
    __slots__ = ("request_id", "attempt", "next_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    next_index: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., next_index: _Optional[int] = ...) -> None: ...

class NodeEvent(_message.Message):
    __slots__ = ("hello", "tokens", "accepted", "errors", "load", "pulls", "flushed", "known", "drawn")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    DRAWN_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    tokens: _containers.RepeatedCompositeFieldContainer[TokenEvent]
    accepted: _containers.RepeatedCompositeFieldContainer[Accepted]
    errors: _containers.RepeatedCompositeFieldContainer[SequenceError]
    load: Load
    pulls: _containers.RepeatedCompositeFieldContainer[PullReport]
    flushed: _containers.RepeatedCompositeFieldContainer[CacheFlushed]
    known: _containers.RepeatedCompositeFieldContainer[Known]
    drawn: Drawn
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[TokenEvent, _Mapping]]] = ..., accepted: _Optional[_Iterable[_Union[Accepted, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[SequenceError, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., pulls: _Optional[_Iterable[_Union[PullReport, _Mapping]]] = ..., flushed: _Optional[_Iterable[_Union[CacheFlushed, _Mapping]]] = ..., known: _Optional[_Iterable[_Union[Known, _Mapping]]] = ..., drawn: _Optional[_Union[Drawn, _Mapping]] = ...) -> None: ...

class Drawn(_message.Message):
    __slots__ = ("request_ids", "attempts", "output_indices", "token_ids")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDICES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    output_indices: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., output_indices: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenEvent(_message.Message):
    __slots__ = ("request_id", "attempt", "output_index", "token_ids", "logprobs", "finish_reason", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    output_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
    finish_reason: _inference_pb2.FinishReason
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., output_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class SequenceError(_message.Message):
    __slots__ = ("request_id", "attempt", "error", "code")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    error: _inference_pb2.ErrorDetail
    code: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., error: _Optional[_Union[_inference_pb2.ErrorDetail, _Mapping]] = ..., code: _Optional[int] = ...) -> None: ...

class PullReport(_message.Message):
    __slots__ = ("request_id", "attempt", "blocks_pulled", "blocks_matched", "bytes_pulled", "seconds", "exposed_s", "transport")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PULLED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_MATCHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    blocks_pulled: int
    blocks_matched: int
    bytes_pulled: int
    seconds: float
    exposed_s: float
    transport: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., blocks_pulled: _Optional[int] = ..., blocks_matched: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., seconds: _Optional[float] = ..., exposed_s: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("beat", "waiting_sequences", "running_sequences", "waiting_tokens", "blocks", "open_leases", "open_pulls", "steps", "step_seconds", "draining", "taken")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OPEN_LEASES_FIELD_NUMBER: _ClassVar[int]
    OPEN_PULLS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    beat: int
    waiting_sequences: int
    running_sequences: int
    waiting_tokens: int
    blocks: BlockCounts
    open_leases: int
    open_pulls: int
    steps: int
    step_seconds: float
    draining: bool
    taken: int
    def __init__(self, beat: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., running_sequences: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., open_leases: _Optional[int] = ..., open_pulls: _Optional[int] = ..., steps: _Optional[int] = ..., step_seconds: _Optional[float] = ..., draining: bool = ..., taken: _Optional[int] = ...) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "cached", "held", "quarantined")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    cached: int
    held: int
    quarantined: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., cached: _Optional[int] = ..., held: _Optional[int] = ..., quarantined: _Optional[int] = ...) -> None: ...
