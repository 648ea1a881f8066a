"""Text while its tokens arrive: what was given out never changes, and the first stop string is found in it.

Knows tokens and their bytes. Knows no files, no requests, no network.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence while its tokens arrive: what was given out never changes.

    All pushes and the flush together give `decode` of all ids. Held back: incomplete UTF-8, and whatever the next token may still change.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text: _Text = _ByteText(tokenizer) if tokenizer.is_byte_level else _WindowText(tokenizer)
        self._push_one = self._text.push

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens made stable; may be empty."""
        return "".join(self._push_one(i) for i in token_ids if i not in self._skipped)

    def push_one(self, token_id: int) -> str:
        """`push` of one token: what streaming does all the time."""
        return "" if token_id in self._skipped else self._push_one(token_id)

    def flush(self) -> str:
        """The rest, once no token will follow; bytes that never became text are U+FFFD."""
        return self._text.flush()


class _Text(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteText:
    """Byte-level tokens: an incremental UTF-8 decoder is exact, and costs no call into the library.

    Most tokens are whole characters, whose text depends on nothing unless a character is open before them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._whole = tokenizer.whole_texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_open = False

    def push(self, token_id: int) -> str:
        if not self._is_open and (whole := self._whole[token_id]) is not None:
            return whole
        text = self._utf8.decode(self._bytes_of(token_id))
        self._is_open = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self._is_open = False
        return self._utf8.decode(b"", final=True)


class _WindowText:
    """Any other decoder: the difference two decodings make, with the last emitted tokens as context for spaces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if not self._tokenizer.knows(token_id):
            return ""  # has no text, so it does not even end a run of byte tokens
        self._pending.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer.decode(self._context, skip_special_tokens=False)
        return text

    def flush(self) -> str:
        text, self._pending = self._new_text(), []
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)[len(self._context_text) :]


@dataclass(frozen=True, slots=True)
class Emitted:
    """text: can be shown, no stop string will claim it. stop: the one found; then num_pieces of the pushed pieces were used up."""

    text: str
    num_pieces: int
    stop: str | None = None


class StopStrings:
    """Finds the first stop string in text that arrives in pieces, one per token. Pure.

    First is the one that ends first, and of several that end there the longest: so pieces do not matter.
    The text of the first `skip_pieces` pieces (min_tokens) is not searched.
    """

    def __init__(self, stops: Sequence[str], skip_pieces: int = 0) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._skip = skip_pieces
        self._held = ""

    def push(self, pieces: Sequence[str]) -> Emitted:
        """Search on through the texts of the next tokens. After a match nothing more may be pushed."""
        shown: list[str] = []
        for count, piece in enumerate(pieces, start=1):
            if self._skip > 0 or not self._stops:
                self._skip = max(0, self._skip - 1)
                shown.append(piece)
                continue
            text = self._held + piece
            if found := self._first_in(text):
                end, start = found
                self._held = ""
                return Emitted("".join(shown) + text[:start], count, text[start:end])
            kept = self._open_length(text)
            shown.append(text[: len(text) - kept])
            self._held = text[len(text) - kept :]
        return Emitted("".join(shown), len(pieces))

    def flush(self) -> str:
        """What was held back, once no text will follow."""
        text, self._held = self._held, ""
        return text

    def _first_in(self, text: str) -> tuple[int, int] | None:
        found = ((start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0)
        return min(found, default=None)

    def _open_length(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stops) - 1
        starts = range(max(0, len(text) - longest), len(text))
        return next((len(text) - at for at in starts if any(stop.startswith(text[at:]) for stop in self._stops)), 0)
