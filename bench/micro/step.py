"""Where the time of a decode step goes: `python -m bench.micro.step [--model DIR]`. One rank, alone in this process.

Every operation of the device seam is timed as the layers call it; what is left of a step is Python and the small tensor work
between the operations. Knows the seam by the names of its operations only.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.config_json import load_spec
from baton.engine.devices import Device, open_device
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.rank import Rank, set_threads
from bench.micro import report, row
from bench.micro.limits import Limits
from kv_transfer.pool import Pool

MODEL = Path("demo/model")
BATCHES, CONTEXT_LEN, BLOCK_SIZE = (1, 16, 128), 75, 16
_BUDGET_S, _MIN_STEPS = 2.0, 30
_KINDS = {
    **dict.fromkeys(("linear", "gated_linear"), "matrix products"),
    **dict.fromkeys(("route", "experts"), "experts"),
    **dict.fromkeys(("attend", "attend_latent"), "attention"),
    **dict.fromkeys(("rms_norm", "add_rms_norm", "rotate", "silu_mul", "embed", "enter", "write"), "elementwise"),
    **dict.fromkeys(("argmax", "draw"), "sampling"),
    "block_attention": "attention's plan",
}
_DRAWN = SampleRow(0, 0, 1.0, 0, 1.0, 0.0)  # as if nobody said how: at temperature 1
_REST, _ALL = "Python and the rest", "whole step"


class Metered:
    """Stands in for a device, or for the attention it prepares, and adds up how long operations take, by kind."""

    def __init__(self, target: Any, seconds: dict[str, float]) -> None:
        self._target, self._seconds = target, seconds

    def __getattr__(self, name: str) -> Any:
        """Asked for once per operation: what is found is kept as an attribute."""
        operation = getattr(self._target, name)
        found = self._timed(operation, name, _KINDS[name]) if name in _KINDS else operation
        self.__dict__[name] = found
        return found

    def _timed(self, operation: Callable[..., Any], name: str, kind: str) -> Callable[..., Any]:
        seconds, prepares = self._seconds, name == "block_attention"

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = operation(*arguments)
            seconds[kind] += time.perf_counter() - started
            return Metered(result, seconds) if prepares else result

        return timed


class Steps:
    """A loaded model whose decode steps are taken apart. Raises ConfigError as loading does."""

    def __init__(self, model_dir: Path, dtype: str, max_rows: int, context_len: int) -> None:
        spec = load_spec(model_dir, dtype)
        shape = KVShape.of(spec, Placement(), BLOCK_SIZE)
        self._blocks_each, self._context_len = -(-context_len // BLOCK_SIZE), context_len
        num_blocks = max_rows * self._blocks_each
        pool = Pool(num_blocks, shape.block_bytes, shared=False)  # as a decode node has it
        kv = KVCache(shape, num_blocks, pool.data, pool.generations)
        self._seconds: dict[str, float] = defaultdict(float)
        device = cast(Device, Metered(open_device("cpu"), self._seconds))
        self._rank = Rank(spec, Placement(), Groups.alone(), model_dir, kv, device)
        self._rank.load()

    def taken_apart(self, num_rows: int) -> dict[str, float]:
        """Seconds of a step of num_rows sequences, by kind: of the fastest of many, for neighbours only ever add to a time."""
        each = self._blocks_each
        batch = Batch.build([Row([i], self._context_len - 1, range(i * each, (i + 1) * each), _DRAWN) for i in range(num_rows)])
        found: list[dict[str, float]] = []
        until = time.perf_counter() + _BUDGET_S
        while len(found) < _MIN_STEPS or time.perf_counter() < until:
            found.append(self._step(batch))
        fastest = min(found, key=lambda of_one: of_one[_ALL])
        whole = fastest.pop(_ALL)
        return {**fastest, _REST: whole - sum(fastest.values()), _ALL: whole}

    def _step(self, batch: Batch) -> dict[str, float]:
        self._seconds.clear()
        started = time.perf_counter()
        self._rank.forward(batch)
        return {**self._seconds, _ALL: time.perf_counter() - started}


def rows(limits: Limits, model_dir: Path = MODEL, dtype: str = "bfloat16", batches: Sequence[int] = BATCHES) -> Iterator[row.Row]:
    """Per batch size, every kind of work beside the whole step."""
    steps = Steps(model_dir, dtype, max(batches), CONTEXT_LEN)
    for num_rows in batches:
        found = steps.taken_apart(num_rows)
        for kind, seconds in found.items():
            yield row.Row(f"{num_rows} rows: {kind}", 1000 * seconds, "ms", 1000 * found[_ALL], _ALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """See --help."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR", help="checkpoint (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="to compute in (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help="sequences of a step (1 16 128)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="compute threads (1)")
    asked = parser.parse_args(arguments)
    set_threads(asked.threads)
    print(report.table(list(rows(Limits(), asked.model, asked.dtype, asked.batches))))


if __name__ == "__main__":
    main()
