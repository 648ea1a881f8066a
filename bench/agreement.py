"""What two runs of a model have in common, from their tokens and log probabilities. Pure; knows no model.

Q: sequences, P: positions of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Agreement:
    """At how many positions two runs choose the same token."""

    equal: int
    total: int

    @classmethod
    def of(cls, one: Ids, other: Ids) -> Agreement:
        """Of two arrays of token ids of one shape."""
        assert one.shape == other.shape and one.size, (one.shape, other.shape)
        return cls(int((one == other).sum()), one.size)

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.equal / self.total


@dataclass(frozen=True, slots=True)
class Prefixes:
    """For how many tokens free-running answers stay the same. whole: the share of answers that never differ."""

    mean: float
    median: float
    whole: float

    @classmethod
    def of(cls, one: Ids, other: Ids) -> Prefixes:
        """Of answers [Q, P]; an answer that never differs counts P."""
        lens = common_prefixes(one, other)
        return cls(mean(lens), float(median(lens)), sum(n == one.shape[1] for n in lens) / len(lens))


def common_prefixes(one: Ids, other: Ids) -> list[int]:
    """Per sequence of [Q, P], how many tokens come before the first that differs."""
    assert one.shape == other.shape and len(one), (one.shape, other.shape)
    return [int(n) for n in np.cumprod(one == other, axis=1).sum(axis=1)]


def perplexity(logprobs: Floats) -> float:
    """exp of the mean negative log probability of the tokens of a text."""
    return math.exp(-float(logprobs.mean(dtype=np.float64)))


@dataclass(frozen=True, slots=True)
class Target:
    """One figure that has to be on the right side of a bound."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """NaN never holds."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        comparison = "at least" if self.at_least else "at most"
        return f"{'holds' if self.holds else 'MISSED'}: {self.name} {self.value:.4f}, wanted {comparison} {self.bound}"


MIN_AGREEMENT = 0.98
MAX_PERPLEXITY_RATIO = 1.02


def targets(forced: Agreement, perplexity_ratio: float) -> tuple[Target, ...]:
    """What an int8 model has to keep of a bf16 one."""
    return (
        Target("teacher-forced top-1 agreement", forced.share, MIN_AGREEMENT, at_least=True),
        Target("perplexity ratio", perplexity_ratio, MAX_PERPLEXITY_RATIO, at_least=False),
    )
