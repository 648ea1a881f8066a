"""What came of a request: what was said, when, and how it ended. Plain values and their comparison; knows no network.

Compared with the undisturbed answer of the same request, token by token.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import BatonError
from bench.chaos.asks import Ask

_LOGPROB_TOLERANCE = 1e-3
# Fewer tokens than these could repeat by chance.
_MIN_REPEATED = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it came. finish_reason: "" but in the last one, which also has usage. served_by: groups, if known."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    served_by: tuple[str, ...] = ()


@dataclass(slots=True)
class Said:
    """An answer so far. at_s: when each token came, on the clock of the run. Owner: the client that reads it."""

    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    served_by: tuple[str, ...] = ()

    def add(self, piece: Piece, at_s: float) -> None:
        """Go on with a piece that came at `at_s`."""
        self.token_ids += piece.token_ids
        self.at_s += [at_s] * len(piece.token_ids)
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.prompt_tokens = piece.prompt_tokens or self.prompt_tokens
        self.completion_tokens = piece.completion_tokens or self.completion_tokens
        self.served_by = piece.served_by or self.served_by


@dataclass(frozen=True, slots=True)
class Failed:
    """An error as the client saw it. stage: "" if no part of Baton said it: the connection broke, or the client's own clock."""

    cause: str
    stage: str
    node: str
    message: str
    status: int
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BatonError) -> Failed:
        """What an error says."""
        return cls(error.cause, error.stage, error.node, error.message, error.http_status, error.retry_after_s)

    @property
    def refused(self) -> bool:
        """Whether something was full: the request was not taken."""
        return self.status == 429

    @property
    def broken(self) -> bool:
        """Whether the connection to the router broke, or could not be made. gRPC calls some breaks in mid-stream INTERNAL."""
        return not self.stage and self.status in (500, 503)


@dataclass(frozen=True, slots=True)
class Try:
    """One time that a client sent a request. failed: None if it finished. silent: no terminal event came, long after the deadline."""

    began_s: float
    ended_s: float
    said: Said
    failed: Failed | None = None
    silent: bool = False

    @property
    def finished(self) -> bool:
        """Whether the answer came whole."""
        return self.failed is None and not self.silent


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that came of a request, try by try: after a refusal or the router's death the client sends it again."""

    ask: Ask
    tries: tuple[Try, ...]

    @property
    def last(self) -> Try:
        """How it ended."""
        return self.tries[-1]


class Flaw(enum.StrEnum):
    """What is wrong with an answer."""

    WRONG = "wrong tokens"
    DOUBLED = "doubled tokens"
    MISSING = "missing tokens"
    TEXT = "wrong text"
    USAGE = "wrong usage"
    LOGPROBS = "wrong logprobs"


def flaw_of(expected: Said, found: Try, *, exact: bool = True) -> Flaw | None:
    """How a try differs from the undisturbed answer; of one that failed, as far as it came. exact: logprobs are compared, too."""
    said = found.said
    if flaw := _tokens_flaw(expected.token_ids, said.token_ids, whole=found.finished):
        return flaw
    if not (expected.text == said.text if found.finished else expected.text.startswith(said.text)):
        return Flaw.TEXT
    if found.finished and not _same_usage(expected, said):
        return Flaw.USAGE
    return None if not exact or _same_logprobs(expected.logprobs, said.logprobs, whole=found.finished) else Flaw.LOGPROBS


def num_same(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs, or before one of them ends."""
    differing = (i for i, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other)
    return next(differing, min(len(expected), len(found)))


def _tokens_flaw(expected: Sequence[int], found: Sequence[int], *, whole: bool) -> Flaw | None:
    same = num_same(expected, found)
    if same == len(found):
        return Flaw.MISSING if whole and same < len(expected) else None
    rest = list(found[same:])
    if any(_begins(expected[same - back :], rest) for back in range(1, same + 1)):
        return Flaw.DOUBLED
    if any(_begins(expected[ahead:], rest) for ahead in range(same + 1, len(expected))):
        return Flaw.MISSING
    return Flaw.WRONG


def _begins(expected: Sequence[int], found: Sequence[int]) -> bool:
    """Whether what was found goes on as expected from here, for as long as both last and for long enough to mean it."""
    num_common = min(len(expected), len(found))
    return num_common >= min(_MIN_REPEATED, len(found)) and list(expected[:num_common]) == list(found[:num_common])


def _same_usage(expected: Said, found: Said) -> bool:
    counts = found.prompt_tokens, found.completion_tokens, found.finish_reason
    return counts == (expected.prompt_tokens, expected.completion_tokens, expected.finish_reason)


def _same_logprobs(expected: Sequence[float], found: Sequence[float], *, whole: bool) -> bool:
    """Whether they agree as far as both go, and go as far as they should where some were asked for."""
    if expected and whole and len(found) != len(expected):
        return False
    return all(abs(one - other) <= _LOGPROB_TOLERANCE for one, other in zip(expected, found, strict=False))
