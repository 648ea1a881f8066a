"""One row, side by side: Baton, peer, Baton, peer …, each round with prompts of its own. Knows servers and rulers.

Baton starts anew for every round, so its start is measured every time. The peer takes minutes to start: it starts once per model, and
is frozen while Baton is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.suite.rows import Row
from bench.suite.ruler import Ruler
from bench.suite.servers import Command, Server, baton, vllm

Say = Callable[[str], None]
# Prompts of different rounds, and of the warm-up, must not begin alike: a prefix cache that outlives a round would know them.
_SEEDS_PER_ROUND = 1000
_WARM_UP_SEED = 500


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements need. peer: the environment with vLLM in it, None to go without. scale: share of the prompts to send."""

    models: Path
    peer: Path | None
    ruler: Ruler
    rounds: int
    logs: Path
    say: Say
    scale: float = 1.0

    def prompts(self, row: Row) -> int:
        """How many to send."""
        return max(1, round(row.num_prompts * self.scale))

    def loaded(self, row: Row, command: Command, number: int) -> dict[str, float]:
        """Warm up and measure, in a round."""
        model, seed, num = self.models / row.model, number * _SEEDS_PER_ROUND, self.prompts(row)
        self.ruler.measured(row, model, command.url, max(1, min(num, max(4, num // 8))), seed + _WARM_UP_SEED)
        return self.ruler.measured(row, model, command.url, num, seed)


class Peer:
    """One vLLM for one model. Starts when it is first needed; frozen whenever it is not measured. Owner: `peer_of`."""

    def __init__(self, bench: Bench, model: str) -> None:
        self._bench = bench
        self._model = model
        self._server: Server | None = None

    @contextmanager
    def running(self) -> Iterator[tuple[Server, bool]]:
        """The server, not frozen, and whether it has just started."""
        first = self._server is None
        if self._server is None:
            assert self._bench.peer is not None
            self._bench.say(f"starting vLLM with {self._model}, once (minutes) ...")
            self._server = Server(vllm(self._bench.models / self._model, self._bench.peer), self._bench.logs)
            self._server.__enter__()
        else:
            self._server.thaw()
        try:
            yield self._server, first
        finally:
            self._server.freeze()

    def end(self) -> None:
        """End it, if it was started."""
        if self._server is not None:
            self._server.__exit__(None, None, None)


@contextmanager
def peer_of(bench: Bench, model: str) -> Iterator[Peer | None]:
    """The peer for all rows of a model; None where there is none."""
    if bench.peer is None:
        yield None
        return
    peer = Peer(bench, model)
    try:
        yield peer
    finally:
        peer.end()


def compared(bench: Bench, row: Row, peer: Peer | None) -> list[dict[str, Any]]:
    """All rounds of a row: {system, round, ready_s (where it started), figures by name}."""
    rounds: list[dict[str, Any]] = []
    for number in range(1, bench.rounds + 1):
        with Server(baton(bench.models / row.model), bench.logs) as server:
            rounds.append(_round("baton", number, server.ready_s, bench.loaded(row, server.command, number)))
        bench.say(_line(row, rounds[-1]))
        if peer is not None:
            with peer.running() as (other, first):
                rounds.append(_round("vllm", number, other.ready_s if first else None, bench.loaded(row, other.command, number)))
            bench.say(_line(row, rounds[-1]))
    return rounds


def _round(system: str, number: int, ready_s: float | None, figures: dict[str, float]) -> dict[str, Any]:
    return {"system": system, "round": number, **({} if ready_s is None else {"ready_s": ready_s}), **figures}


def _line(row: Row, found: dict[str, Any]) -> str:
    shown = {
        "output tok/s": "output_throughput",
        "TTFT": "mean_ttft_ms",
        "TPOT": "mean_tpot_ms",
        "p99 ITL": "p99_itl_ms",
        "ready s": "ready_s",
    }
    figures = "  ".join(f"{label} {found[key]:.1f}" for label, key in shown.items() if key in found)
    return f"{row.name} round {found['round']} {found['system']:>6}: {figures}"
