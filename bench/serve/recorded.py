"""Data sets that come as files: ShareGPT conversations, and traces in Mooncake's form. Deterministic; knows files and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.errors import ConfigError
from baton.tokenizer import Tokenizer
from bench.serve.asks import Ask
from bench.serve.vocabulary import Vocabulary

# What conversations are left out, as every bench_serving does it.
_MIN_TOKENS, _MAX_PROMPT, _MAX_TOTAL = 4, 1024, 2048


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How a trace is played. slowdown: 2 takes twice the time. length: lengths and blocks are multiplied by it, so that sharing stays.

    block_len: tokens that one hash stands for, 512 in Mooncake's traces.
    """

    slowdown: float = 1.0
    length: float = 1.0
    block_len: int = 512

    def __post_init__(self) -> None:
        if self.slowdown <= 0 or self.length <= 0 or self.block_len < 1:
            raise ConfigError("the scales of a trace, and the tokens of a block, must be over 0")


def sharegpt_asks(path: Path, tokenizer: Tokenizer, num: int, output_len: int | None, rng: np.random.Generator) -> list[Ask]:
    """The first question of conversations, in random order, as long to answer as it was answered. Raises ConfigError."""
    conversations = _read(path, json.loads)
    if not isinstance(conversations, list):
        raise ConfigError(f"{path} is no list of conversations")
    turns = [found for item in conversations if (found := _turns(item)) is not None]
    asks: list[Ask] = []
    for index in rng.permutation(len(turns)):
        if len(asks) == num:
            break
        asks += _question(turns[int(index)], tokenizer, output_len)
    return _enough(asks, num, path)


def _turns(conversation: Any) -> tuple[str, str] | None:
    try:
        asked, answered = (conversation["conversations"][i]["value"] for i in (0, 1))
    except (KeyError, IndexError, TypeError):
        return None  # not every entry of these files is a conversation
    return (asked, answered) if isinstance(asked, str) and isinstance(answered, str) else None


def _question(turns: tuple[str, str], tokenizer: Tokenizer, output_len: int | None) -> Iterator[Ask]:
    asked, answered = turns
    num_prompt = len(tokenizer.encode(asked))
    num_output = len(tokenizer.encode(answered)) if output_len is None else output_len
    short = num_prompt < _MIN_TOKENS or (output_len is None and num_output < _MIN_TOKENS)
    if not short and num_prompt <= _MAX_PROMPT and num_prompt + num_output <= _MAX_TOTAL:
        yield Ask(asked, num_prompt, num_output)


def mooncake_asks(path: Path, vocabulary: Vocabulary, num: int, scale: TraceScale, seed: int) -> list[Ask]:
    """A trace of JSON lines {timestamp (ms), input_length, output_length, hash_ids} as token ids, by time. Raises ConfigError.

    A hash always becomes the same tokens, whatever its place, so prompts share what they shared when the trace was taken.
    """
    lines = _read(path, lambda text: [json.loads(line) for line in text.splitlines()[:num] if line.strip()])
    block_len = max(1, round(scale.block_len * scale.length))
    try:
        requests = [_Request.of(number, line, scale) for number, line in enumerate(lines)]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no trace of timestamp, input_length, output_length, hash_ids: {error!r}") from error
    blocks: dict[int, list[int]] = {}
    first_s = min((request.at_s for request in requests), default=0.0)
    asks = [
        Ask(_tokens(request, blocks, block_len, vocabulary, seed), request.input_len, request.output_len, request.at_s - first_s)
        for request in sorted(requests, key=lambda request: request.at_s)
    ]
    return _enough(asks, num, path)


@dataclass(frozen=True, slots=True)
class _Request:
    number: int
    at_s: float
    input_len: int
    output_len: int
    hashes: tuple[int, ...]

    @classmethod
    def of(cls, number: int, line: Mapping[str, Any], scale: TraceScale) -> _Request:
        return cls(
            number=number,
            at_s=float(line["timestamp"]) / 1e3 * scale.slowdown,
            input_len=max(1, round(int(line["input_length"]) * scale.length)),
            output_len=max(1, round(int(line["output_length"]) * scale.length)),
            hashes=tuple(int(number) for number in line["hash_ids"]),
        )


def _tokens(request: _Request, blocks: dict[int, list[int]], block_len: int, vocabulary: Vocabulary, seed: int) -> tuple[int, ...]:
    """The blocks' tokens, cut to the prompt's length; what no hash stands for is this request's own."""
    tokens: list[int] = []
    for number in request.hashes:
        if number not in blocks:
            blocks[number] = vocabulary.drawn(block_len, np.random.default_rng([seed, 1, abs(number), number < 0]))
        tokens += blocks[number]
    missing = request.input_len - len(tokens)
    if missing > 0:
        tokens += vocabulary.drawn(missing, np.random.default_rng([seed, 2, request.number]))
    return tuple(tokens[: request.input_len])


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"--dataset-path {path} cannot be read: {error}") from error


def _enough(asks: list[Ask], num: int, path: Path) -> list[Ask]:
    if not asks:
        raise ConfigError(f"{path} holds no usable request")
    return [asks[i % len(asks)] for i in range(num)] if asks[0].at_s is None else asks
