"""One request to be sent, as a data set makes it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """prompt: text or token ids. prompt_len: tokens the server should count, those its tokenizer adds by itself included.

    output_len: most tokens to generate. at_s: seconds after the start, where a trace says so.
    """

    prompt: str | TokenIds
    prompt_len: int
    output_len: int
    at_s: float | None = None
