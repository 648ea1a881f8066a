"""What a micro-benchmark finds. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured, beside its limit or its reference from the same run, in the same unit.

    what: for a reader ("shm, spans of 192 KiB"). unit: GB/s, GFLOP/s, us, ms, ...; rates are better high, times low.
    limit: None where there is nothing to compare with. limit_name: what the limit is ("memcpy", "GEMM peak", "1 ms budget").
    """

    what: str
    value: float
    unit: str
    limit: float | None = None
    limit_name: str = ""

    @property
    def ratio(self) -> float | None:
        """value / limit: the share of a rate's limit that is reached, or how many times as long as its limit a time is."""
        return self.value / self.limit if self.limit else None
