"""Token streams and the windows cut from them; a batch is a function of the seed and the step alone, so resuming is exact."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .chat import Message, conversations
from .corpus import Corpus
from .tokenizer import END_OF_TEXT


def texts(corpus: Corpus, *, held_out: bool, seed: int) -> tuple[list[str], list[list[Message]]]:
    """Plain documents and conversations of one side of the split."""
    documents = corpus.side(held_out=held_out)
    return [document.text for document in documents], list(conversations(documents, seed))


def stream(tokenizer: PreTrainedTokenizerFast, plain: list[str], chats: list[list[Message]], seed: int) -> Tensor:
    """All texts in one shuffled row of tokens, each closed by the end-of-text token."""
    rendered = [str(tokenizer.apply_chat_template([*map(dict, chat)], tokenize=False)) for chat in chats]
    everything = [*plain, *rendered]
    random.Random(seed).shuffle(everything)
    joined = [token for text in everything for token in tokenizer.encode(text + END_OF_TEXT)]
    return torch.tensor(joined, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Windows:
    """Training windows: every epoch cuts the stream at a fresh offset and visits each window once."""

    tokens: Tensor
    seed: int

    def batch(self, step: int, rows: int, length: int) -> Tensor:
        """`rows` windows of `length` + 1 tokens: inputs and, shifted by one, targets."""
        count = (len(self.tokens) - 1) // length - 1
        starts = [self._start(*divmod(step * rows + row, count), count, length) for row in range(rows)]
        return torch.stack([self.tokens[start : start + length + 1] for start in starts]).long()

    def _start(self, epoch: int, place: int, count: int, length: int) -> int:
        rng = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        offset = int(torch.randint(length, (), generator=rng))
        return offset + length * int(torch.randperm(count, generator=rng)[place])


def even_windows(tokens: Tensor, rows: int, length: int) -> Tensor:
    """At most `rows` evenly spaced windows, the same at every call: what held-out losses are measured on."""
    count = (len(tokens) - 1) // length
    chosen = torch.linspace(0, count - 1, min(rows, count)).long() * length
    return torch.stack([tokens[start : start + length + 1] for start in chosen.tolist()]).long()
