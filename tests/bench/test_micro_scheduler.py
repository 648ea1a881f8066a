"""The scheduler's micro-benchmark runs production code to its end and reports every step that it was asked for. No times are looked at."""

from bench.micro import scheduler
from bench.micro.limits import Limits


def test_every_batch_and_every_line_is_measured() -> None:
    found = {row.what: row for row in scheduler.rows(Limits(), batches=(1, 3), waiting=(2,))}
    for what in ("decode, batch 1", "decode, batch 3", "decode, batch 128, 2 waiting"):
        whole, between = found[f"{what}: plan + apply + tell"], found[f"{what}: of it between steps"]
        assert whole.limit == scheduler.BUDGET_MS and 0 < between.value < whole.value
    assert found["prefill, 2 waiting: plan + apply"].value > 0
