"""What a request is, as plain values: shared by router, nodes and clients. Knows no messages and no tensors."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

SEED_BITS = 63


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one sequence, fully resolved: nodes apply no defaults.

    max_tokens, min_tokens: output tokens counted from the end of the prompt. temperature 0 is greedy.
    top_k 0, top_p 1, min_p 0 are off. stop_token_ids hold the end-of-sequence ids unless they are ignored.
    num_logprobs: None for none, 0 for the sampled token's only, k for the k most likely too.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None

    def finish(self, num_output_tokens: int, last_token_id: int) -> FinishReason | None:
        """Whether the sequence ends after `num_output_tokens` tokens of which `last_token_id` is the last."""
        if num_output_tokens > self.min_tokens and last_token_id in self.stop_token_ids:
            return FinishReason.STOP
        if num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One attempt at one sequence, as a node sees it: `emitted_ids` were delivered by earlier attempts."""

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    emitted_ids: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """What messages about this attempt are keyed by."""
        return (self.request_id, self.attempt)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural, of the unmodified distribution) of a sampled token and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens output_index, output_index + 1, … of one attempt; at most one event per sequence and step."""

    request_id: str
    attempt: int
    output_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None


@dataclass(slots=True)
class Drawn:
    """Single tokens of many attempts, as columns of one length: row i is token output_indices[i] of attempt attempts[i].

    Only of tokens that neither end their sequence nor carry logprobs or cached_tokens; everything else is a TokenEvent. Whoever holds
    one may append to it until it is handed on.
    """

    request_ids: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    output_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    def rows(self) -> Iterator[tuple[str, int, int, int]]:
        """(request id, attempt, output index, token id), row by row."""
        return zip(self.request_ids, self.attempts, self.output_indices, self.token_ids, strict=True)

    def append(self, request_id: str, attempt: int, output_index: int, token_id: int) -> None:
        """One more row."""
        self.request_ids.append(request_id)
        self.attempts.append(attempt)
        self.output_indices.append(output_index)
        self.token_ids.append(token_id)

    def extend(self, other: Drawn) -> None:
        """All rows of another one, after the own."""
        self.request_ids += other.request_ids
        self.attempts += other.attempts
        self.output_indices += other.output_indices
        self.token_ids += other.token_ids

    def only(self, wanted: Sequence[bool]) -> Drawn:
        """The rows whose place is True in `wanted`."""
        return Drawn(
            list(compress(self.request_ids, wanted)),
            list(compress(self.attempts, wanted)),
            list(compress(self.output_indices, wanted)),
            list(compress(self.token_ids, wanted)),
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def plus(self, other: Usage) -> Usage:
        """The sum of two usages, field by field."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Where a pool's blocks are: free + cached + held + quarantined = total, always."""

    total: int
    free: int
    cached: int
    held: int
    quarantined: int

    def balanced(self) -> bool:
        """Whether every block is accounted for exactly once."""
        return self.free + self.cached + self.held + self.quarantined == self.total

    def idle(self) -> bool:
        """Whether no block is in use by a sequence or a peer."""
        return self.balanced() and self.held == 0 and self.quarantined == 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a client asks to continue: exactly one of text, token_ids and messages is set.

    template_values: what the chat template is told beside the messages, plain JSON.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None
    add_generation_prompt: bool = True
    template_values: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingAsked:
    """What the client wrote; None where it wrote nothing. Resolved by the router against generation_config and limits."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request of a client, before the router has looked at it.

    default_max_tokens: used when sampling.max_tokens is None; None there means the remaining context.
    """

    prompt: Prompt
    sampling: SamplingAsked = field(default_factory=SamplingAsked)
    request_id: str = ""
    model: str = ""
    n: int = 1
    stream: bool = True
    echo: bool = False
    default_max_tokens: int | None = None
    timeout_s: float | None = None


class Chunk(NamedTuple):
    """A piece of one choice's answer, as a client sees it. Text and token_ids continue what came before if is_delta.

    A tuple, for there is one per token: a frozen dataclass takes three times as long to make.
    """

    request_id: str
    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None
    usage: Usage | None = None
    seed: int | None = None
    is_delta: bool = True
    served_by: tuple[str, ...] = ()
