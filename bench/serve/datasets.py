"""Data sets made here: `random` and `prefix`. Deterministic: the same seed and tokenizer give the same requests. No clock, no network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from baton.errors import ConfigError
from bench.serve.asks import Ask
from bench.serve.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers, drawn evenly from [length x (1 - ratio), length x (1 + ratio)], as in vLLM."""

    input_len: int
    output_len: int
    input_ratio: float = 0.0
    output_ratio: float = 0.0

    def draw(self, num: int, num_added: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """(input lengths without what the tokenizer adds, output lengths). Raises ConfigError."""
        for ratio in (self.input_ratio, self.output_ratio):
            if not 0 <= ratio < 1:
                raise ConfigError(f"--random-range-ratio must be from 0 to under 1 (given: {ratio:g})")
        wanted = max(0, self.input_len - num_added)
        inputs = _evenly(wanted, self.input_ratio, num, rng)
        return inputs, [max(1, length) for length in _evenly(self.output_len, self.output_ratio, num, rng)]


def _evenly(length: int, ratio: float, num: int, rng: np.random.Generator) -> list[int]:
    low, high = math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
    return [int(value) for value in rng.integers(low, high + 1, num)]


def random_asks(
    vocabulary: Vocabulary, num: int, lengths: Lengths, prefix_len: int, rng: np.random.Generator, *, as_ids: bool = False
) -> list[Ask]:
    """Neighbours of the vocabulary from a random place on, after prefix_len tokens that all have in common. Raises ConfigError."""
    inputs, outputs = lengths.draw(num, 0 if as_ids else vocabulary.num_added, rng)
    if prefix_len + min(inputs) < 1:
        raise ConfigError(f"--random-input-len {lengths.input_len} leaves prompts without a token")
    offsets = rng.integers(0, len(vocabulary.ids), num)
    shared = _Prefix.made(vocabulary, prefix_len, rng)
    return [
        shared.extended(vocabulary, vocabulary.run(int(offset) + index, length), output, rng, as_ids)
        for index, (offset, length, output) in enumerate(zip(offsets, inputs, outputs, strict=True))
    ]


def prefix_asks(
    vocabulary: Vocabulary,
    num: int,
    num_prefixes: int,
    lengths: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    as_ids: bool = False,
) -> list[Ask]:
    """Requests in num_prefixes groups, each of which has its own prefix; shuffled. lengths: tokens of prefix, suffix and answer."""
    prefix_len, suffix_len, output_len = lengths
    if not 0 < num_prefixes <= num:
        raise ConfigError(f"--prefix-repetition-num-prefixes {num_prefixes} must be from 1 to --num-prompts {num}")
    if suffix_len < 1 and prefix_len < 1:
        raise ConfigError("prompts of no token: set --prefix-repetition-prefix-len or --prefix-repetition-suffix-len")
    prefixes = [_Prefix.made(vocabulary, prefix_len, rng) for _ in range(num_prefixes)]
    asks = [
        prefixes[number % num_prefixes].extended(vocabulary, vocabulary.drawn(suffix_len, rng), output_len, rng, as_ids)
        for number in range(num)
    ]
    return [asks[i] for i in rng.permutation(num)]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """What several prompts begin with, as tokens and as text. num_tokens: of the text, with what the tokenizer adds."""

    ids: tuple[int, ...]
    text: str
    num_tokens: int

    @classmethod
    def made(cls, vocabulary: Vocabulary, length: int, rng: np.random.Generator) -> _Prefix:
        ids = vocabulary.drawn(length, rng)
        total = length + vocabulary.num_added
        return cls(tuple(ids), vocabulary.text("", ids, total, rng) if length else "", total)

    def extended(self, vocabulary: Vocabulary, ids: list[int], output_len: int, rng: np.random.Generator, as_ids: bool) -> Ask:
        if as_ids:
            whole = (*self.ids, *ids)
            return Ask(whole, len(whole), output_len)
        total = self.num_tokens + len(ids)
        return Ask(vocabulary.text(self.text, ids, total, rng), total, output_len)
