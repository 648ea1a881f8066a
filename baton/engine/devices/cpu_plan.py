"""How the cpu cuts up attention, as plain arithmetic: which runs of a context, and which way through latents. Pure; no tensors.

`segments` is for the torch path, cpu_units.py for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baton.engine.batch import Batch, Int32, Int64


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """Sequences that compute their last lens[i] tokens of context_lens[i], whose blocks are tables[i]; a part of a Batch."""

    lens: Int32  # [S]
    context_lens: Int32  # [S]
    tables: Int32  # [S, M]

    @classmethod
    def of(cls, batch: Batch) -> Contexts:
        """All of a batch."""
        return cls(np.diff(batch.query_starts), batch.context_lens, batch.block_tables)

    def __getitem__(self, sequences: Int64) -> Contexts:
        return Contexts(self.lens[sequences], self.context_lens[sequences], self.tables[sequences])


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start … stop - 1 of a sequence's context: seen by all of the step's queries, or `causal`: the queries' own tokens."""

    start: int
    stop: int
    causal: bool

    def num_blocks(self, block_size: int) -> int:
        """How many blocks it touches."""
        return -(-self.stop // block_size) - self.start // block_size


def segments(num_tokens: int, context_len: int, longest: int) -> list[Segment]:
    """The whole context, for a step that computes its last num_tokens tokens: what all of them see in runs of up to `longest`.

    A chunk itself is one causal run, as long as the step makes it; a single token sees all and so needs none.
    """
    own = 0 if num_tokens == 1 else num_tokens
    seen = context_len - own
    runs = [Segment(start, min(start + longest, seen), causal=False) for start in range(0, seen, longest)]
    return [*runs, Segment(seen, context_len, causal=True)] if own else runs


@dataclass(frozen=True, slots=True)
class LatentDims:
    """Widths of latent attention, per head: MlaSpec's."""

    latent: int
    nope: int
    rope: int
    value: int

    @property
    def expanded(self) -> int:
        """Width of an expanded key and value, which the fused attention wants alike: the narrower is padded."""
        return max(self.nope + self.rope, self.value)

    def absorbs(self, num_tokens: int, context_len: int) -> bool:
        """Whether n tokens over a context of c are cheaper to compute with the up-projections absorbed than with latents expanded.

        Multiply-adds per head: absorbed, n * latent * (nope + value) to take queries into the latent space and results out of it,
        and n * c * 2 * (latent + rope) for attention there; expanded, c * latent * (nope + value) for keys and values of the whole
        context, and n * c * 2 * expanded for attention. A decode row always absorbs, a prompt from its start never does. That a
        chunk sees only half of itself is left out on both sides.
        """
        up = self.latent * (self.nope + self.value)
        absorbed = num_tokens * (up + context_len * 2 * (self.latent + self.rope))
        expanded = context_len * (up + num_tokens * 2 * self.expanded)
        return num_tokens == 1 or absorbed < expanded
