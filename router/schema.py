"""What HTTP clients may send, and what it means as GenerateRequests: the ground rules and OpenAI's two bodies.

Knows fields, their ranges and which of them Baton does not support. Knows no HTTP, no tokenizer and no model; limits that depend on
the model are admission's. A field that is not supported is refused by name unless its value asks for nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from baton.errors import InvalidRequest
from baton.request import SEED_BITS, GenerateRequest, Prompt, SamplingAsked
from router.schema_json import SHOWN_CHARS, read_json, shown

MAX_LOGPROBS = 20
MAX_ITEMS = 16_384  # of one list that is looked at item by item; what is allowed is less, and admission's affair
MAX_RID_CHARS = 128
_NOTHING: tuple[object, ...] = (0, "", [], {})
_EXPLAINED = 8


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What /v1/models says. created: Unix seconds. max_model_len: prompt and answer, tokens."""

    name: str
    max_model_len: int
    created: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What one HTTP request may ask for: max_prompts prompts, max_answers to all of them together. Of one prompt: admission's n."""

    max_prompts: int = 1024
    max_answers: int = 4096


def nothing(*names: str) -> dict[str, tuple[object, ...]]:
    """Unsupported fields whose neutral values are 0, false, "", [] and {}."""
    return dict.fromkeys(names, _NOTHING)


class _Refused(ValueError):
    """A field that cannot be taken, where pydantic would not know its name by itself."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Accepted(BaseModel):
    """A JSON object of a client. null means not given; unsupported fields maps names to values that ask for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if value is not None and cls._takes(name, value)}

    @classmethod
    def _takes(cls, name: str, value: object) -> bool:
        if name in cls.ignored:
            return False
        if name in cls.unsupported:
            if value in cls.unsupported[name]:
                return False
            raise _Refused(name, f"{name} is not supported (given: {shown(value)}); leave it out")
        if name not in cls.model_fields:
            close = difflib.get_close_matches(name, cls.model_fields, n=1)
            raise _Refused(
                name[:SHOWN_CHARS], f"{name[:SHOWN_CHARS]} is not a known field" + (f"; did you mean {close[0]}?" if close else "")
            )
        return True


@dataclass(frozen=True, slots=True)
class PromptList:
    """The prompts of one body, text or token ids. is_list: whether the client sent a list of prompts rather than one."""

    items: tuple[str | tuple[int, ...], ...]
    is_list: bool = False

    @property
    def is_text(self) -> bool:
        """Whether these are texts."""
        return isinstance(self.items[0], str)


def _few(value: object) -> object:
    """A list that is short enough to be looked at: pydantic would explain what is wrong with every item."""
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise ValueError(f"must have at most {MAX_ITEMS} items (given: {len(value)})")
    return value


def _prompts(value: object) -> PromptList:
    if isinstance(value, str):
        return PromptList((value,))
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return PromptList((_token_ids(value),))
        _few(value)
        if all(isinstance(item, str) for item in value):
            return PromptList(tuple(value), is_list=True)
        if all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in value):
            return PromptList(tuple(_token_ids(item) for item in value), is_list=True)
    raise ValueError("must be text, a list of texts, a list of token ids, or a list of lists of token ids, none of them empty")


def _token_ids(value: list[int]) -> tuple[int, ...]:
    if min(value) < 0 or max(value) >= 2**31:
        raise ValueError(f"token ids must be 0 … 2147483647 (given: {min(value)} … {max(value)})")
    return tuple(value)


def _stops(value: object) -> object:
    return ([value] if value else []) if isinstance(value, str) else _few(value)


def _joined_text(value: object) -> object:
    """A message's content as text; its parts are joined by line breaks, as vLLM does."""
    if not isinstance(value, list):
        return value
    _few(value)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"content parts must be {{'type': 'text', 'text': …}}; {shown(kind)} is not supported")
    return "\n".join(part["text"] for part in value)


def _some(value: object) -> object:
    """vLLM takes 0 tokens with echo, and gives the prompt back: not worth a way of its own. Without echo it refuses as well."""
    if value == 0 and type(value) is int:
        raise ValueError("must be at least 1 (given: 0); a prompt is not given back alone, with echo neither")
    return value


Prompts = Annotated[PromptList, BeforeValidator(_prompts)]
Stops = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_stops)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**SEED_BITS)]
Count = Annotated[int, BeforeValidator(_some), Field(ge=1, lt=2**31)]
Few = BeforeValidator(_few)


class SamplingFields(Accepted):
    """Sampling as both interfaces name it. n is the number of answers per prompt."""

    n: int = Field(1, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    stop: Stops = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Few] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def asked(self, max_tokens: int | None, min_tokens: int | None, seed: int | None, logprobs: int | None) -> SamplingAsked:
        """What the client asked of sampling; the arguments are what the interfaces name differently."""
        return SamplingAsked(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens,
        )


class StreamOptions(Accepted):
    """What a stream carries beside text: a last chunk with usage, or usage in every chunk (vLLM)."""

    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False
    continuous_usage_stats: bool = False


class OpenAIBody(SamplingFields):
    """What /v1/completions and /v1/chat/completions share: OpenAI's sampling fields and vLLM's extensions."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **nothing("presence_penalty", "frequency_penalty", "logit_bias", "prompt_logprobs", "use_beam_search", "response_format"),
        **nothing("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
        **nothing("guided_whitespace_pattern", "structural_tag", "allowed_token_ids", "bad_words", "truncate_prompt_tokens"),
        **nothing("include_stop_str_in_output", "return_tokens_as_token_ids", "logits_processors", "kv_transfer_params", "vllm_xargs"),
        **nothing("priority", "cache_salt", "request_id"),
        "repetition_penalty": (1.0,),
        "length_penalty": (1.0,),
        "response_format": (*_NOTHING, {"type": "text"}),
        "spaces_between_special_tokens": (True,),
    }
    ignored = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Count | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    seed: Seed | None = None
    return_token_ids: bool = False


class CompletionBody(OpenAIBody):
    """POST /v1/completions. Answers are numbered prompt by prompt: index = prompt * n + i."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **OpenAIBody.unsupported,
        **nothing("suffix"),
        "add_special_tokens": (True,),
    }

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, lt=2**31)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.best_of not in (None, self.n):
            raise _Refused("best_of", f"best_of is not supported unless it equals n (given: best_of {self.best_of}, n {self.n})")
        if self.echo and self.logprobs is not None:
            raise _Refused("echo", "echo with logprobs is not supported: ask for one of them")
        return self

    def requests(self, request_id: str, timeout_s: float | None, limits: Limits) -> tuple[GenerateRequest, ...]:
        """One request per prompt."""
        check_counts([self.n] * len(self.prompt.items), limits)
        return tuple(
            GenerateRequest(
                prompt=as_prompt(prompt),
                sampling=self.asked(self.max_tokens, self.min_tokens, self.seed, self.logprobs),
                request_id=part_id,
                model=self.model,
                n=self.n,
                stream=self.stream,
                echo=self.echo,
                default_max_tokens=16,
                timeout_s=timeout_s,
            )
            for prompt, part_id in zip(self.prompt.items, part_ids(request_id, len(self.prompt.items)), strict=True)
        )


class ChatMessage(Accepted):
    """One turn of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = nothing("tool_calls", "tool_call_id", "function_call", "audio")
    ignored = frozenset({"refusal", "annotations"})

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text)] = ""
    name: str = ""
    reasoning_content: str = ""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise _Refused("content", "content is required")
        return self

    def as_dict(self) -> dict[str, str]:
        """The message as chat templates read it."""
        extra = {"name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": self.role, "content": self.content} | {name: value for name, value in extra.items() if value}


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions. chat_template_kwargs: vLLM's and SGLang's way to tell the template more, say enable_thinking."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **OpenAIBody.unsupported,
        **nothing("tools", "functions", "audio", "prediction", "web_search_options", "reasoning_effort", "verbosity", "documents"),
        **nothing("chat_template", "continue_final_message", "echo", "add_special_tokens", "mm_processor_kwargs"),
        "modalities": (*_NOTHING, ["text"]),
        "parallel_tool_calls": (True, False),
        "tool_choice": (*_NOTHING, "none", "auto"),
        "function_call": (*_NOTHING, "none", "auto"),
        "include_reasoning": (True,),
    }

    messages: Annotated[tuple[ChatMessage, ...], Few]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.messages:
            raise _Refused("messages", "messages must hold at least one message")
        if self.top_logprobs and not self.logprobs:
            raise _Refused("top_logprobs", f"top_logprobs needs logprobs: true (given: top_logprobs {self.top_logprobs})")
        return self

    def requests(self, request_id: str, timeout_s: float | None, limits: Limits) -> tuple[GenerateRequest, ...]:
        """The one request of a conversation; without a limit of tokens it may fill the context."""
        messages = tuple(message.as_dict() for message in self.messages)
        max_tokens = self.max_completion_tokens or self.max_tokens
        request = GenerateRequest(
            prompt=Prompt(messages=messages, add_generation_prompt=self.add_generation_prompt, template_values=self.chat_template_kwargs),
            sampling=self.asked(max_tokens, self.min_tokens, self.seed, self.top_logprobs if self.logprobs else None),
            request_id=request_id,
            model=self.model,
            n=self.n,
            stream=self.stream,
            timeout_s=timeout_s,
        )
        return (request,)


T = TypeVar("T", bound=Accepted)


def parse(kind: type[T], body: bytes) -> T:
    """A client's body as `kind`; InvalidRequest names what is wrong with it."""
    try:
        return kind.model_validate(read_json(body))
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        more = f"; and {len(wrong) - _EXPLAINED} more" if len(wrong) > _EXPLAINED else ""
        explained = "; ".join(_explain(item) for item in wrong[:_EXPLAINED])
        raise InvalidRequest(explained + more, param=_field(wrong[0])) from error


def part_ids(request_id: str, count: int) -> tuple[str, ...]:
    """Request ids for the prompts of one HTTP request: the id itself, or with .0, .1, … where there are several."""
    return (request_id,) if count == 1 else tuple(f"{request_id}.{i}" for i in range(count))


def as_prompt(prompt: str | tuple[int, ...]) -> Prompt:
    """Text or token ids as a Prompt."""
    return Prompt(text=prompt) if isinstance(prompt, str) else Prompt(token_ids=prompt)


def check_counts(ns: Sequence[int], limits: Limits) -> None:
    """Refuse more prompts, or answers to all of them, than one body may ask for. ns: the number of answers of each prompt."""
    if len(ns) > limits.max_prompts:
        raise InvalidRequest(f"one request may hold at most {limits.max_prompts} prompts (given: {len(ns)})", param="prompt")
    if len(ns) > 1 and sum(ns) > limits.max_answers:
        raise InvalidRequest(
            f"one request may ask for at most {limits.max_answers} answers to its prompts together (given: {sum(ns)})", param="n"
        )


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":  # ours: says itself what was given
        message = str(item["ctx"]["error"])
        return f"{where}: {message}" if where else message
    if item["type"] == "missing":
        return f"{where} is required"
    return f"{where or 'body'}: {item['msg']} (given: {shown(item['input'])})"


def _field(item: Any) -> str:
    """Which field is at fault, dotted: "temperature", "messages.0.content"; "" where it is the body as a whole."""
    error = item.get("ctx", {}).get("error")
    return ".".join([*(str(part) for part in item["loc"]), *([error.field] if isinstance(error, _Refused) else [])])
