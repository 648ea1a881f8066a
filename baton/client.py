"""The gRPC client of a Baton cluster: `Client` for asyncio, `SyncClient` for everybody else. Errors are those of baton/errors.py.

    with connect("127.0.0.1:8001") as client:
        for chunk in client.generate("Once upon a time", max_tokens=32):
            print(chunk.text, end="")

Knows baton.v1's public services and nothing of what is behind them.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict, Unpack

import grpc

from baton.errors import InternalError, InvalidRequest
from baton.request import Chunk, FinishReason, GenerateRequest, Prompt, SamplingAsked, TokenLogprob, Usage
from baton.rpc import open_channel, open_sync_channel, to_error, understood
from baton.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from baton.wire import chunk_from_message, generate_request_to_message

ADMIN_TIMEOUT_S = 30.0
PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]]


class Options(TypedDict, total=False):
    """What may be said about one request beside its prompt; what is left out takes the server's defaults."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    skip_special_tokens: bool
    n: int
    stream: bool
    echo: bool
    timeout_s: float
    request_id: str
    model: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole choice. usage counts the request: it is the same for all its choices."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    stopped_by: int | str | None = None
    seed: int | None = None
    served_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model served. max_model_len: prompt and answer, tokens."""

    name: str
    max_model_len: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Drained:
    """What became of a node's work. idle: nothing of the router's is on it any more. handed_over: sequences that went on elsewhere."""

    idle: bool
    handed_over: int


class Client:
    """A connection for one event loop. Close it, or use it as `async with`."""

    def __init__(self, address: str, api_key: str | None = None) -> None:
        self._channel = open_channel(address)
        self._metadata = _metadata(api_key)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and whatever runs on it."""
        await self._channel.close(None)

    async def generate(self, prompt: PromptLike, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """Stream the chunks of an answer. Raises BatonError; leaving the iterator (aclose) cancels the request."""
        request = make_request(prompt, options)
        call = self._inference.Generate(_message(request), timeout=request.timeout_s, metadata=self._metadata)
        try:
            async for message in call:
                yield chunk_from_message(understood(message))
        except grpc.RpcError as error:
            raise to_error(error) from error
        finally:
            call.cancel()

    async def complete(self, prompt: PromptLike, **options: Unpack[Options]) -> list[Answer]:
        """All n answers, whole. Raises BatonError."""
        options.setdefault("stream", False)
        return gather([chunk async for chunk in self.generate(prompt, **options)])

    async def models(self) -> tuple[Model, ...]:
        """What the cluster serves."""
        try:
            reply = await self._inference.Models(inference_pb2.ModelsRequest(), timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return _models(understood(reply))

    async def status(self) -> admin_pb2.StatusReply:
        """Groups, pairs and counts."""
        try:
            reply: admin_pb2.StatusReply = await self._admin.Status(
                admin_pb2.StatusRequest(), timeout=ADMIN_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise to_error(error) from error
        return understood(reply)

    async def drain(self, node: str, timeout_s: float, *, retire: bool = False) -> admin_pb2.DrainReply:
        """Send no new work to a node; what is there after timeout_s goes on elsewhere. retire: once it is idle, end its processes.

        The reply's idle: whether nothing is left there; handed_over: how many sequences went on elsewhere.
        """
        request = admin_pb2.DrainRequest(node=node, timeout_s=timeout_s, retire=retire)
        try:
            reply: admin_pb2.DrainReply = await self._admin.Drain(request, timeout=timeout_s + ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return understood(reply)

    async def restore(self, node: str) -> None:
        """Take a drained or retired node back into service; a retired one is built anew, which is not waited for."""
        try:
            await self._admin.Restore(admin_pb2.RestoreRequest(node=node), timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error

    async def flush_cache(self, node: str = "") -> int:
        """Forget cached prefixes that no sequence uses, on a node or ("") on all; how many blocks are free now that were not."""
        request = admin_pb2.FlushCacheRequest(node=node)
        try:
            reply = await self._admin.FlushCache(request, timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return int(understood(reply).blocks)


class SyncClient:
    """The same for blocking callers; may be shared by threads. Close it, or use it as `with`."""

    def __init__(self, address: str, api_key: str | None = None) -> None:
        self._channel = open_sync_channel(address)
        self._metadata = _metadata(api_key)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and whatever runs on it."""
        self._channel.close()

    def generate(self, prompt: PromptLike, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Stream the chunks of an answer. Raises BatonError; leaving the iterator (close) cancels the request."""
        request = make_request(prompt, options)
        call = self._inference.Generate(_message(request), timeout=request.timeout_s, metadata=self._metadata)
        try:
            for message in call:
                yield chunk_from_message(message)
        except grpc.RpcError as error:
            raise to_error(error) from error
        finally:
            call.cancel()

    def complete(self, prompt: PromptLike, **options: Unpack[Options]) -> list[Answer]:
        """All n answers, whole. Raises BatonError."""
        options.setdefault("stream", False)
        return gather(list(self.generate(prompt, **options)))

    def models(self) -> tuple[Model, ...]:
        """What the cluster serves."""
        try:
            reply = self._inference.Models(inference_pb2.ModelsRequest(), timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return _models(understood(reply))

    def status(self) -> admin_pb2.StatusReply:
        """Groups, pairs and counts."""
        try:
            reply: admin_pb2.StatusReply = self._admin.Status(admin_pb2.StatusRequest(), timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return understood(reply)

    def drain(self, node: str, timeout_s: float, *, retire: bool = False) -> admin_pb2.DrainReply:
        """As Client.drain."""
        request = admin_pb2.DrainRequest(node=node, timeout_s=timeout_s, retire=retire)
        try:
            reply: admin_pb2.DrainReply = self._admin.Drain(request, timeout=timeout_s + ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return understood(reply)

    def restore(self, node: str) -> None:
        """As Client.restore."""
        try:
            self._admin.Restore(admin_pb2.RestoreRequest(node=node), timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error

    def flush_cache(self, node: str = "") -> int:
        """Forget cached prefixes that no sequence uses, on a node or ("") on all; how many blocks are free now that were not."""
        request = admin_pb2.FlushCacheRequest(node=node)
        try:
            reply = self._admin.FlushCache(request, timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
        return int(understood(reply).blocks)


def connect(address: str, api_key: str | None = None) -> SyncClient:
    """A blocking client of the router at host:port. Connects with the first call."""
    return SyncClient(address, api_key)


def make_request(prompt: PromptLike, options: Options) -> GenerateRequest:
    """A prompt (text, token ids or chat messages) and its options as a request. Raises InvalidRequest for an option nobody knows."""
    _check_known(options)
    stop = options.get("stop", ())
    return GenerateRequest(
        prompt=_prompt(prompt),
        sampling=SamplingAsked(
            max_tokens=options.get("max_tokens"),
            min_tokens=options.get("min_tokens"),
            temperature=options.get("temperature"),
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            min_p=options.get("min_p"),
            seed=options.get("seed"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(options.get("stop_token_ids", ())),
            ignore_eos=options.get("ignore_eos", False),
            logprobs=options.get("logprobs"),
            skip_special_tokens=options.get("skip_special_tokens", True),
        ),
        request_id=options.get("request_id", ""),
        model=options.get("model", ""),
        n=options.get("n", 1),
        stream=options.get("stream", True),
        echo=options.get("echo", False),
        timeout_s=options.get("timeout_s"),
    )


def _check_known(options: Options) -> None:
    known = Options.__annotations__
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise InvalidRequest(f"{name} is not a known option; {hint}", stage="client")


def gather(chunks: Iterable[Chunk]) -> list[Answer]:
    """All chunks of a request as one Answer per choice, by number."""
    parts: dict[int, list[Chunk]] = {}
    usage: Usage | None = None
    for chunk in chunks:
        parts.setdefault(chunk.choice, []).append(chunk)
        usage = chunk.usage or usage
    if usage is None:
        raise InternalError("the router ended the stream without usage")
    return [_answer(parts[choice], usage) for choice in sorted(parts)]


def _answer(chunks: Sequence[Chunk], usage: Usage) -> Answer:
    last = chunks[-1]
    if last.finish_reason is None:
        raise InternalError(f"the router ended the stream, but choice {last.choice} has no finish reason")
    return Answer(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        finish_reason=last.finish_reason,
        usage=usage,
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        stopped_by=last.stopped_by,
        seed=chunks[0].seed,
        served_by=last.served_by,
    )


def _prompt(prompt: PromptLike) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    messages = [item for item in prompt if isinstance(item, Mapping)]
    token_ids = [item for item in prompt if isinstance(item, int)]
    if messages and len(messages) == len(prompt) and all({"role", "content"} <= item.keys() for item in messages):
        return Prompt(messages=tuple(dict(item) for item in messages))
    if len(token_ids) == len(prompt):
        return Prompt(token_ids=tuple(token_ids))
    raise InvalidRequest("a prompt is text, a list of token ids, or a list of messages, each with role and content")


def _message(request: GenerateRequest) -> inference_pb2.GenerateRequest:
    try:
        return generate_request_to_message(request)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request holds a value that baton.v1 cannot carry: {error}") from error


def _models(reply: inference_pb2.ModelsReply) -> tuple[Model, ...]:
    return tuple(Model(card.name, card.max_model_len, card.dtype) for card in reply.models)


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
