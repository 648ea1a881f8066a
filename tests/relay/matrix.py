"""What the golden matrix is made of, and which part of it suffices to see every pair of its axes once. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")
WITH_EXPERTS = ("qwen3_moe", "deepseek_v3")
PREFILL: dict[str, dict[str, object]] = {
    "tp1": {},
    "tp2": {"prefill.tp": 2},
    "tp4": {"prefill.tp": 4},
    "tp2-sliced-experts": {"prefill.tp": 2, "prefill.moe": "tensor"},
}
DECODE: dict[str, dict[str, object]] = {
    "dp1": {},
    "dp2": {"decode.dp": 2},
    "tp2": {"decode.tp": 2},
    "tp4": {"decode.tp": 4},
    "dp2tp2": {"decode.dp": 2, "decode.tp": 2},
}
MAX_RANKS = 6


@dataclass(frozen=True, slots=True)
class Cell:
    """One cluster of the matrix: a model on a prefill shape and a decode shape."""

    arch: str
    prefill: str
    decode: str

    @property
    def layout(self) -> dict[str, object]:
        """The settings of both shapes."""
        return PREFILL[self.prefill] | DECODE[self.decode]

    @property
    def num_ranks(self) -> int:
        """Processes it takes, without the router."""
        return int(str(self.layout.get("prefill.tp", 1))) + self.num_groups * int(str(self.layout.get("decode.tp", 1)))

    @property
    def num_groups(self) -> int:
        """Data-parallel groups of the decode node."""
        return int(str(self.layout.get("decode.dp", 1)))

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """The pairs of values that it shows."""
        return set(combinations((f"arch {self.arch}", f"prefill {self.prefill}", f"decode {self.decode}"), 2))

    def __str__(self) -> str:
        return f"{self.arch}-{self.prefill}-{self.decode}"


# Beside the matrix: fewer KV heads than ranks on either side, and experts that prefill ranks share slice by slice.
EXTRA = (
    Cell("llama", "tp4", "dp1"),
    Cell("qwen3_moe", "tp2-sliced-experts", "dp2"),
    Cell("deepseek_v3", "tp4", "tp2"),
)
MORE_EXTRA = (
    Cell("qwen2", "tp4", "tp2"),
    Cell("llama", "tp1", "tp4"),
    Cell("deepseek_v3", "tp2-sliced-experts", "dp1"),
)


def cells() -> Iterator[Cell]:
    """The whole matrix; both ways to multiply decode ranks at once only where that couples them, by experts."""
    for arch, prefill, decode in product(ARCHITECTURES, ("tp1", "tp2"), ("dp1", "dp2", "tp2", "dp2tp2")):
        if decode != "dp2tp2" or arch in WITH_EXPERTS:
            yield Cell(arch, prefill, decode)


def covering(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Cells that together show every pair that any cell shows: always the one with the most that are new, the first of equals."""
    missing = set().union(*(cell.pairs for cell in cells))
    chosen: list[Cell] = []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(cell.pairs & missing)))
        missing -= chosen[-1].pairs
    return tuple(chosen)
