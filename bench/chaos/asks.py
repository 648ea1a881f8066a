"""What the clients ask: drawn from a seed, so that two runs ask the same. Pure; knows no network and no model."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import ConfigError
from baton.request import SEED_BITS

# Prompts share these beginnings: whole blocks of them, and parts of blocks.
_PREFIX_LENS = (16, 24, 48, 64, 96, 120)
_NUM_PREFIXES = 10
_TAIL_LENS = (3, 40)
_LONG_LENS = (160, 280)
_STOPS = ("\n\n", "return", "self")


class Door(enum.StrEnum):
    """By which interface a request comes in."""

    GRPC = "grpc"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. number: its place in the run, by which two runs are compared. temperature 0 is greedy.

    num_logprobs: None for none, 0 for those of the sampled tokens, k for the k most likely ones too.
    """

    number: int
    door: Door
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = True
    num_logprobs: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """Everything that a run asks. burst: long requests that are sent all at once, to fill the pools; numbered after the others."""

    asks: tuple[Ask, ...]
    burst: tuple[Ask, ...]

    @property
    def all(self) -> tuple[Ask, ...]:
        """For the undisturbed run: every request that may be asked, once."""
        return self.asks + self.burst


def draw(text_ids: Sequence[int], num_asks: int, num_burst: int, output_lens: tuple[int, int], seed: int) -> Asked:
    """Requests cut from a text in tokens. output_lens: least and most output tokens. Raises ConfigError for too short a text."""
    if len(text_ids) <= max(_LONG_LENS) + max(_PREFIX_LENS):
        raise ConfigError(f"the text has {len(text_ids)} tokens, too few to cut prompts of {max(_LONG_LENS)} from: give a longer --text")
    chance = random.Random(f"asks {seed}")
    prefixes = [_cut(text_ids, chance.choice(_PREFIX_LENS), chance) for _ in range(_NUM_PREFIXES)]
    asks = tuple(_ask(number, text_ids, prefixes, output_lens, chance) for number in range(num_asks))
    return Asked(asks, tuple(_long(num_asks + i, text_ids, chance) for i in range(num_burst)))


def _ask(
    number: int, text_ids: Sequence[int], prefixes: Sequence[tuple[int, ...]], output_lens: tuple[int, int], chance: random.Random
) -> Ask:
    """Three of four with a shared beginning, half of them greedy, a quarter over HTTP."""
    shared = chance.choice(prefixes) if chance.random() < 0.75 else ()
    return Ask(
        number=number,
        door=Door.HTTP if chance.random() < 0.25 else Door.GRPC,
        prompt_ids=shared + _cut(text_ids, chance.randint(*_TAIL_LENS), chance),
        max_tokens=chance.randint(*output_lens),
        temperature=chance.choice((0.0, 0.0, 0.7, 1.0)),
        top_p=chance.choice((1.0, 0.9)),
        top_k=chance.choice((0, 40)),
        seed=chance.getrandbits(SEED_BITS),
        ignore_eos=chance.random() < 0.75,
        num_logprobs=0 if chance.random() < 0.3 else None,
        stop=(chance.choice(_STOPS),) if chance.random() < 0.1 else (),
    )


def _long(number: int, text_ids: Sequence[int], chance: random.Random) -> Ask:
    door = chance.choice((Door.GRPC, Door.HTTP))
    prompt_ids = _cut(text_ids, chance.randint(*_LONG_LENS), chance)
    return Ask(number, door, prompt_ids, chance.randint(*_LONG_LENS))


def _cut(text_ids: Sequence[int], length: int, chance: random.Random) -> tuple[int, ...]:
    start = chance.randrange(len(text_ids) - length)
    return tuple(int(token_id) for token_id in text_ids[start : start + length])
