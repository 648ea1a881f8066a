"""Messages of baton.v1 <-> our types: the only file that knows both. Pure conversion.

What a peer says is checked here as far as it can be without knowing the model: values that would break whoever works with them raise
InvalidRequest. The limits are those of our types (ids are int32 on a device), not policy: that is router/admission.py's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from baton import request as types
from baton.errors import BatonError, InvalidRequest
from baton.v1 import inference_pb2, node_pb2

ID_LIMIT = 2**31  # token ids and counts of tokens are below it
MAX_REQUEST_ID_CHARS = 1024
MAX_SEQUENCE_TOKENS = 2**23
MAX_CHAT_MESSAGES = 2**14
MAX_STOP_IDS = 4096
MAX_NUM_LOGPROBS = 64
MAX_TIME_LEFT_S = 1e9
_MAX_MESSAGE_CHARS, _MAX_NAME_CHARS = 4096, 256
_MAX_RETRY_AFTER_S = 3600.0
_CAUSE = re.compile(r"[a-z0-9_]{1,64}")
_FINISH_TO_MESSAGE = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    types.FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    types.FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_MESSAGE = {message: reason for reason, message in _FINISH_TO_MESSAGE.items()}


def error_to_message(error: BatonError) -> inference_pb2.ErrorDetail:
    """The facts of an error; its class travels as the gRPC status beside it."""
    return inference_pb2.ErrorDetail(
        stage=error.stage,
        node=error.node,
        cause=error.cause,
        message=error.message,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
    )


def error_from_message(message: inference_pb2.ErrorDetail, kind: type[BatonError]) -> BatonError:
    """The error of class `kind` with the facts in `message`, cut to what logs, metrics and headers can carry."""
    later_s = message.retry_after_s if message.HasField("retry_after_s") else math.nan
    return kind(
        message.message[:_MAX_MESSAGE_CHARS],
        stage=message.stage[:_MAX_NAME_CHARS],
        node=message.node[:_MAX_NAME_CHARS],
        cause=message.cause if _CAUSE.fullmatch(message.cause) else "",
        retryable=message.retryable,
        retry_after_s=later_s if 0 <= later_s <= _MAX_RETRY_AFTER_S else None,
    )


def logprob_to_message(logprob: types.TokenLogprob) -> inference_pb2.TokenLogprob:
    """One token's log-probabilities."""
    top = [inference_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return inference_pb2.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top)


def logprob_from_message(message: inference_pb2.TokenLogprob) -> types.TokenLogprob:
    """The inverse of logprob_to_message; InvalidRequest for what is no log-probability (-inf is one)."""
    for value in (message.logprob, *(top.logprob for top in message.top)):
        if not value < math.inf:
            raise InvalidRequest(f"the log-probability of token {message.token_id} is {value}", cause="malformed")
    return types.TokenLogprob(message.token_id, message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def finish_to_message(reason: types.FinishReason | None) -> inference_pb2.FinishReason:
    """UNSPECIFIED stands for "goes on"."""
    return _FINISH_TO_MESSAGE[reason]


def finish_from_message(message: inference_pb2.FinishReason) -> types.FinishReason | None:
    """The inverse of finish_to_message; InvalidRequest for a value this version does not know."""
    if message not in _FINISH_FROM_MESSAGE:
        raise InvalidRequest(f"unknown finish reason {message}; the peer speaks a newer protocol")
    return _FINISH_FROM_MESSAGE[message]


def sequence_to_message(sequence: types.SequenceRequest, time_left_s: float) -> node_pb2.SequenceRequest:
    """A sequence as a node sees it, with the seconds left until its deadline."""
    return node_pb2.SequenceRequest(
        request_id=sequence.request_id,
        attempt=sequence.attempt,
        prompt_ids=sequence.prompt_ids,
        emitted_ids=sequence.emitted_ids,
        sampling=_sampling_to_message(sequence.sampling),
        time_left_s=time_left_s,
    )


def sequence_from_message(message: node_pb2.SequenceRequest) -> types.SequenceRequest:
    """The inverse of sequence_to_message; InvalidRequest, saying which, for values that no sequence can have."""
    _check_sequence(message)
    return types.SequenceRequest(
        request_id=message.request_id,
        attempt=message.attempt,
        prompt_ids=tuple(message.prompt_ids),
        sampling=_sampling_from_message(message.sampling),
        emitted_ids=tuple(message.emitted_ids),
    )


def _check_sequence(message: node_pb2.SequenceRequest) -> None:
    sampling, emitted = message.sampling, len(message.emitted_ids)
    if not message.prompt_ids:
        raise InvalidRequest(f"sequence {message.request_id[:_MAX_NAME_CHARS]} has no prompt tokens", cause="empty_prompt")
    _refuse_unless(0 < len(message.request_id) <= MAX_REQUEST_ID_CHARS, "request_id", f"has {len(message.request_id)} characters")
    _refuse_unless(len(message.prompt_ids) <= MAX_SEQUENCE_TOKENS, "prompt_ids", f"are {len(message.prompt_ids)}")
    time_left_from_message(message.time_left_s)
    _refuse_unless(max(message.prompt_ids) < ID_LIMIT, "prompt_ids", f"holds {max(message.prompt_ids)}")
    _refuse_unless(max(message.emitted_ids, default=0) < ID_LIMIT, "emitted_ids", f"holds {max(message.emitted_ids, default=0)}")
    _refuse_unless(0 < sampling.max_tokens < ID_LIMIT, "max_tokens", f"is {sampling.max_tokens}")
    _refuse_unless(emitted < sampling.max_tokens, "emitted_ids", f"are {emitted} of at most {sampling.max_tokens}")
    _check_sampling(sampling)


def time_left_from_message(seconds: float) -> float:
    """Seconds that a peer leaves for something; InvalidRequest for what no clock can count."""
    _refuse_unless(0 <= seconds <= MAX_TIME_LEFT_S, "time_left_s", f"is {seconds}")
    return seconds


def _check_sampling(sampling: node_pb2.ResolvedSampling) -> None:
    _refuse_unless(sampling.min_tokens <= sampling.max_tokens, "min_tokens", f"is {sampling.min_tokens}")
    _refuse_unless(0 <= sampling.temperature < math.inf, "temperature", f"is {sampling.temperature}")
    _refuse_unless(sampling.top_k < ID_LIMIT, "top_k", f"is {sampling.top_k}")
    _refuse_unless(0 <= sampling.top_p <= 1, "top_p", f"is {sampling.top_p}")
    _refuse_unless(0 <= sampling.min_p <= 1, "min_p", f"is {sampling.min_p}")
    _refuse_unless(sampling.num_logprobs <= MAX_NUM_LOGPROBS, "num_logprobs", f"is {sampling.num_logprobs}")
    _refuse_unless(len(sampling.stop_token_ids) <= MAX_STOP_IDS, "stop_token_ids", f"are {len(sampling.stop_token_ids)}")
    highest = max(sampling.stop_token_ids, default=0)
    _refuse_unless(highest < ID_LIMIT, "stop_token_ids", f"holds {highest}")


def _refuse_unless(good: bool, field: str, fact: str) -> None:
    """NaN is never good: every comparison with it is false."""
    if not good:
        raise InvalidRequest(f"nothing can be done for a peer whose {field} {fact}", cause="malformed", param=field)


def _sampling_to_message(sampling: types.Sampling) -> node_pb2.ResolvedSampling:
    return node_pb2.ResolvedSampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        num_logprobs=sampling.num_logprobs,
    )


def _sampling_from_message(message: node_pb2.ResolvedSampling) -> types.Sampling:
    return types.Sampling(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )


def token_event_to_message(event: types.TokenEvent) -> node_pb2.TokenEvent:
    """Tokens of one sequence and step."""
    return node_pb2.TokenEvent(
        request_id=event.request_id,
        attempt=event.attempt,
        output_index=event.output_index,
        token_ids=event.token_ids,
        logprobs=[logprob_to_message(item) for item in event.logprobs],
        finish_reason=finish_to_message(event.finish_reason),
        cached_tokens=event.cached_tokens,
    )


def token_event_from_message(message: node_pb2.TokenEvent) -> types.TokenEvent:
    """The inverse of token_event_to_message; InvalidRequest for values that no event can have."""
    if message.token_ids and max(message.token_ids) >= ID_LIMIT:
        raise InvalidRequest(f"a token event holds id {max(message.token_ids)}", cause="malformed")
    return types.TokenEvent(
        request_id=message.request_id,
        attempt=message.attempt,
        output_index=message.output_index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprob_from_message(item) for item in message.logprobs),
        finish_reason=finish_from_message(message.finish_reason),
        cached_tokens=message.cached_tokens if message.HasField("cached_tokens") else None,
    )


def drawn_to_message(drawn: types.Drawn) -> node_pb2.Drawn:
    """Single tokens of many sequences."""
    return node_pb2.Drawn(
        request_ids=drawn.request_ids, attempts=drawn.attempts, output_indices=drawn.output_indices, token_ids=drawn.token_ids
    )


def drawn_from_message(message: node_pb2.Drawn) -> types.Drawn:
    """The inverse of drawn_to_message; InvalidRequest for columns of different lengths and for ids that no token has."""
    drawn = types.Drawn(list(message.request_ids), list(message.attempts), list(message.output_indices), list(message.token_ids))
    lengths = {len(drawn.request_ids), len(drawn.attempts), len(drawn.output_indices), len(drawn.token_ids)}
    if len(lengths) > 1:
        raise InvalidRequest(f"the columns of drawn tokens have different lengths: {sorted(lengths)}", cause="malformed")
    if drawn.token_ids and max(drawn.token_ids) >= ID_LIMIT:
        raise InvalidRequest(f"drawn tokens hold id {max(drawn.token_ids)}", cause="malformed")
    return drawn


def counts_to_message(counts: types.BlockCounts) -> node_pb2.BlockCounts:
    """Where a pool's blocks are."""
    return node_pb2.BlockCounts(
        total=counts.total, free=counts.free, cached=counts.cached, held=counts.held, quarantined=counts.quarantined
    )


def counts_from_message(message: node_pb2.BlockCounts) -> types.BlockCounts:
    """The inverse of counts_to_message."""
    return types.BlockCounts(message.total, message.free, message.cached, message.held, message.quarantined)


def generate_request_from_message(message: inference_pb2.GenerateRequest, timeout_s: float | None) -> types.GenerateRequest:
    """A client's request; InvalidRequest if it has no prompt."""
    return types.GenerateRequest(
        prompt=_prompt_from_message(message),
        sampling=_asked_from_message(message.sampling),
        request_id=message.request_id,
        model=message.model,
        n=message.n if message.HasField("n") else 1,
        stream=message.stream if message.HasField("stream") else True,
        echo=message.echo,
        timeout_s=timeout_s,
    )


def generate_request_to_message(request: types.GenerateRequest) -> inference_pb2.GenerateRequest:
    """The inverse of generate_request_from_message (the timeout travels as the call's deadline).

    InvalidRequest for what baton.v1 has no field for: message fields beside role and content, values for the chat template.
    """
    prompt = request.prompt
    if prompt.template_values:
        raise InvalidRequest("baton.v1 carries no values for the chat template; send them over HTTP (chat_template_kwargs)")
    chat = None
    if prompt.messages is not None:
        messages = [_chat_message(item) for item in prompt.messages]
        chat = inference_pb2.ChatPrompt(messages=messages, add_generation_prompt=prompt.add_generation_prompt)
    return inference_pb2.GenerateRequest(
        request_id=request.request_id,
        model=request.model,
        text=prompt.text,
        chat=chat,
        token_ids=None if prompt.token_ids is None else inference_pb2.TokenIds(ids=prompt.token_ids),
        sampling=_asked_to_message(request.sampling),
        n=request.n,
        stream=request.stream,
        echo=request.echo,
    )


def _chat_message(item: Mapping[str, str]) -> inference_pb2.ChatMessage:
    if more := sorted(item.keys() - {"role", "content"}):
        raise InvalidRequest(f"messages in baton.v1 have role and content only, not {', '.join(more)}", param="messages")
    return inference_pb2.ChatMessage(role=item["role"], content=item["content"])


def _prompt_from_message(message: inference_pb2.GenerateRequest) -> types.Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return types.Prompt(text=message.text)
        case "token_ids":
            count = len(message.token_ids.ids)
            _refuse_unless(count <= MAX_SEQUENCE_TOKENS, "token_ids", f"are {count}, of at most {MAX_SEQUENCE_TOKENS}")
            return types.Prompt(token_ids=tuple(message.token_ids.ids))
        case "chat":
            chat = message.chat
            _refuse_unless(len(chat.messages) <= MAX_CHAT_MESSAGES, "messages", f"are {len(chat.messages)}, of at most {MAX_CHAT_MESSAGES}")
            wanted = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
            messages = tuple({"role": item.role, "content": item.content} for item in chat.messages)
            return types.Prompt(messages=messages, add_generation_prompt=wanted)
    raise InvalidRequest("the request has no prompt: set text, chat or token_ids", cause="empty_prompt")


def _asked_from_message(message: inference_pb2.Sampling) -> types.SamplingAsked:
    def given(name: str) -> bool:
        return message.HasField(name)

    return types.SamplingAsked(
        max_tokens=message.max_tokens if given("max_tokens") else None,
        min_tokens=message.min_tokens if given("min_tokens") else None,
        temperature=message.temperature if given("temperature") else None,
        top_k=message.top_k if given("top_k") else None,
        top_p=message.top_p if given("top_p") else None,
        min_p=message.min_p if given("min_p") else None,
        seed=message.seed if given("seed") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if given("logprobs") else None,
        skip_special_tokens=message.skip_special_tokens if given("skip_special_tokens") else True,
    )


def _asked_to_message(asked: types.SamplingAsked) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(
        max_tokens=asked.max_tokens,
        min_tokens=asked.min_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        seed=asked.seed,
        stop=asked.stop,
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        skip_special_tokens=asked.skip_special_tokens,
    )


def chunk_to_message(chunk: types.Chunk) -> inference_pb2.GenerateChunk:
    """A piece of an answer."""
    stopped = chunk.stopped_by
    return inference_pb2.GenerateChunk(
        request_id=chunk.request_id,
        choice=chunk.choice,
        is_delta=chunk.is_delta,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=[logprob_to_message(item) for item in chunk.logprobs],
        finish_reason=finish_to_message(chunk.finish_reason),
        stop_token_id=stopped if isinstance(stopped, int) else None,
        stop_string=stopped if isinstance(stopped, str) else None,
        usage=None if chunk.usage is None else _usage_to_message(chunk.usage),
        seed=chunk.seed,
        served_by=chunk.served_by,
    )


def chunk_from_message(message: inference_pb2.GenerateChunk) -> types.Chunk:
    """The inverse of chunk_to_message."""
    return types.Chunk(
        request_id=message.request_id,
        choice=message.choice,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprob_from_message(item) for item in message.logprobs),
        finish_reason=finish_from_message(message.finish_reason),
        stopped_by=_stopped_by(message),
        usage=_usage_from_message(message.usage) if message.HasField("usage") else None,
        seed=message.seed if message.HasField("seed") else None,
        is_delta=message.is_delta,
        served_by=tuple(message.served_by),
    )


def _stopped_by(message: inference_pb2.GenerateChunk) -> int | str | None:
    match message.WhichOneof("stopped_by"):
        case "stop_token_id":
            return message.stop_token_id
        case "stop_string":
            return message.stop_string
    return None


def _usage_to_message(usage: types.Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, cached_tokens=usage.cached_tokens
    )


def _usage_from_message(message: inference_pb2.Usage) -> types.Usage:
    return types.Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def tokens_to_messages(events: Sequence[types.TokenEvent]) -> list[node_pb2.TokenEvent]:
    """All token events of one step."""
    return [token_event_to_message(event) for event in events]
