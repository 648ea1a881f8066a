"""The tokenizer of the simulated model: one token per byte, with two special ones. Made in memory, the production class."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from baton.request import SamplingAsked
from baton.tokenizer import Tokenizer
from simulator.model import EOS_ID, VOCAB_SIZE

BOS, EOS = "<s>", "</s>"


@cache
def make_tokenizer() -> Tokenizer:
    """Immutable, so one serves all worlds."""
    core = Core(models.BPE(vocab={char: byte for byte, char in enumerate(_chars())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([BOS, EOS])
    assert core.get_vocab_size() == VOCAB_SIZE and core.token_to_id(EOS) == EOS_ID
    return Tokenizer(core, {"bos_token": BOS, "eos_token": EOS}, None, SamplingAsked(), (EOS_ID,))


def _chars() -> list[str]:
    """What stands for byte 0, 1, … in byte-level vocabularies: printable Latin-1 for itself, characters from 256 on for the others."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
