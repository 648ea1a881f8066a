"""Texts that have exactly so many tokens. Knows a tokenizer; no data set.

Tokens drawn at random, decoded and encoded again, are often not the same tokens: two of them join, or a torn character becomes three.
So a text is encoded again, cut or extended and decoded anew until the count is right, as vLLM's generator does it; where that does
not come to rest, a new start is drawn. A count that cannot be met is an error: a load with other lengths than it says is another load.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baton.errors import ConfigError
from baton.tokenizer import Tokenizer

_ROUNDS, _STARTS = 10, 20


class Vocabulary:
    """The tokens a prompt may be drawn from: all that are text by themselves, and not special.

    num_added: tokens the tokenizer adds to any text by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        allowed = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids and _is_text(tokenizer, i)]
        if not allowed:
            raise ConfigError("the tokenizer has no tokens that are text by themselves")
        self.ids = np.array(allowed, np.int64)
        self.num_added = len(tokenizer.encode(""))
        self._tokenizer = tokenizer

    def run(self, offset: int, length: int) -> list[int]:
        """Neighbours in the vocabulary, from `offset` on."""
        return [int(i) for i in self.ids[(offset + np.arange(length)) % len(self.ids)]]

    def drawn(self, length: int, rng: np.random.Generator) -> list[int]:
        """Any tokens, each as likely as another."""
        return [int(i) for i in self.ids[rng.integers(0, len(self.ids), length)]]

    def text(self, prefix: str, ids: Sequence[int], length: int, rng: np.random.Generator) -> str:
        """prefix and what ids say after it, so that both together have `length` tokens, those that are added included."""
        start = list(ids)
        for _ in range(_STARTS):
            if (text := self._settled(prefix, start, length, rng)) is not None:
                return text
            start = self.drawn(len(ids), rng)
        raise ConfigError(f"no text of exactly {length} tokens was found in {_STARTS} tries; --tokenize-prompt sends token ids instead")

    def _settled(self, prefix: str, ids: list[int], length: int, rng: np.random.Generator) -> str | None:
        for _ in range(_ROUNDS):
            said = self._tokenizer.decode(ids, skip_special_tokens=False)
            num_over = len(self._tokenizer.encode(prefix + said)) - length
            if num_over == 0:
                return prefix + said
            if num_over > 0:
                again = list(self._tokenizer.encode(said, add_special_tokens=False))
                ids = again[: max(len(again) - num_over, 0)]
            else:
                ids = list(self._tokenizer.encode(said, add_special_tokens=False)) + self.drawn(-num_over, rng)
        return None


def _is_text(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether a token is whole characters. Pieces of characters would all become the same replacement character."""
    try:
        return bool(tokenizer.token_bytes(token_id).decode()) and not tokenizer.is_byte_token(token_id)
    except UnicodeDecodeError:
        return False
