"""How the tokens that a step has for prompts are shared out: on prefill, and on decode where it computes prompts itself. Pure.

Fewest tokens left first, and of equals the older: so a short prompt is not held up by a long one, and equally long ones are
computed one after the other. The oldest prompt under way is sure of half a step, however many shorter ones come: so none waits
for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Shareable(Protocol):
    """A prompt as far as sharing goes."""

    @property
    def arrival(self) -> int:
        """Its number: older ones have lower ones."""

    @property
    def num_left(self) -> int:
        """Tokens still to be computed, one or more."""


Prompt = TypeVar("Prompt", bound=Shareable)


@dataclass(slots=True)
class Shares(Generic[Prompt]):
    """The tokens of one step. Made for it and gone with it. left: tokens not given to anybody yet, of which `kept` are the oldest's.

    queue: prompts under way that have had no turn in this step, in the order of their turns. given: what each got.
    """

    left: int
    queue: list[Prompt]
    kept: int = 0
    oldest: Prompt | None = None
    given: list[tuple[Prompt, int]] = field(default_factory=list)

    @classmethod
    def of(cls, num_tokens: int, under_way: list[Prompt]) -> Shares[Prompt]:
        """A step of `num_tokens` for prompts under way; new ones may come between them."""
        oldest = min(under_way, key=lambda prompt: prompt.arrival, default=None)
        kept = min(num_tokens // 2, oldest.num_left) if oldest else 0
        return cls(num_tokens, sorted(under_way, key=lambda prompt: (prompt.num_left, prompt.arrival)), kept, oldest)

    def serve(self, num_left: float) -> None:
        """The turns of prompts under way with no more tokens left than this."""
        while self.queue and self.queue[0].num_left <= num_left:
            self.give(self.queue.pop(0))

    def room(self) -> int:
        """Tokens for whoever is next and not the oldest."""
        return self.left - self.kept

    def give(self, prompt: Prompt) -> None:
        """The turn of a prompt: all it needs, or all there is for it."""
        if prompt is self.oldest:
            self.kept = 0
        count = min(prompt.num_left, self.room())
        if count:
            self.left -= count
            self.given.append((prompt, count))
