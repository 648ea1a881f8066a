"""`baton bench serve`: from options to a table, a file and a picture.

Exit codes: 0 all requests succeeded, 1 some failed or the server cannot be reached, 2 the options cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from baton.errors import Unavailable
from bench.serve.answers import Answer
from bench.serve.asks import Ask
from bench.serve.backend import Backend, Target
from bench.serve.chosen import arrival_s, make_asks
from bench.serve.load import Load
from bench.serve.metrics import measured
from bench.serve.openai import OpenAIBackend
from bench.serve.options import Place, dataset, goals, sampling
from bench.serve.plot import picture
from bench.serve.report import Run, as_json, detailed, errors, table, warnings
from bench.serve.result_file import described, result_file

_BAR_S = 0.5  # drawing is work, too
_MAX_WARMUP_S = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave. model: as the server calls it."""

    model: str
    answers: Sequence[Answer]
    duration_s: float
    run: Run


def bench_serve(options: argparse.Namespace) -> int:
    """Run it; the exit code. Raises ConfigError and Unavailable."""
    file = result_file(options)
    outcome = asyncio.run(_outcome(options))
    metrics = measured(outcome.answers, outcome.duration_s, options.metric_percentiles, goals(options))
    print(table(metrics, outcome.run, options.percentile_metrics))
    for line in warnings(metrics, outcome.run):
        print(f"WARNING: {line}", file=sys.stderr)
    for line in errors(outcome.answers):
        print(f"failed: {line}", file=sys.stderr)
    if file is not None:
        found = described(options, outcome.model) | as_json(metrics, outcome.run, options.percentile_metrics)
        file.write(found | (detailed(outcome.answers) if options.save_detailed else {}))
    if options.plot is not None:
        options.plot.write_text(picture(outcome.answers, f"{outcome.model}: {_said(options)}"), encoding="utf-8")
    return 130 if outcome.run.interrupted else 1 if metrics.failed or not metrics.completed else 0


async def _outcome(options: argparse.Namespace) -> Outcome:
    model, backend = await _reached(options)
    try:
        asks = make_asks(options, model)
        at_s = arrival_s(options, asks)
        await _warm_up(backend, asks, options)
        gc.collect()
        gc.freeze()  # prompts and bodies live to the end: looking at them again and again would only make pauses
        with tqdm(total=len(asks), disable=True if options.disable_tqdm else None, mininterval=_BAR_S, unit="req") as bar:
            load = Load(backend, asks, at_s, options.max_concurrency, lambda answer: _advance(bar), options.request_id_prefix)
            with _first_interrupt(load) as interrupted:
                cpu_s = time.process_time()
                answers = await load.run()
                cpu_s, over_s = time.process_time() - cpu_s, time.monotonic()
        last_s = max((answer.end_s for answer in answers if answer.ended), default=over_s)
        duration_s = (over_s if interrupted else last_s) - load.began_s
        return Outcome(model, answers, duration_s, Run(options.request_rate, options.max_concurrency, cpu_s, bool(interrupted)))
    finally:
        await backend.close()


def _advance(bar: Any) -> None:
    bar.update(1)


@contextmanager
def _first_interrupt(load: Load) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM ends the load, and is put into what this yields; the next one does what it always does."""
    loop, seen = asyncio.get_running_loop(), list[int]()

    def interrupt(number: int) -> None:
        seen.append(number)
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
        load.stop()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, interrupt, signum)
    try:
        yield seen
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)


async def _reached(options: argparse.Namespace) -> tuple[str, Backend]:
    """The model's name and a backend that sends it. Without --model the server is asked."""
    name = options.served_model_name or options.model
    if not name:
        asking = _backend(options, "")
        try:
            served = await asking.models()
        finally:
            await asking.close()
        if not served:
            raise Unavailable("the server serves no model: name one with --model", stage="client")
        name = served[0]
        print(f"model: {name}", file=sys.stderr)
    return name, _backend(options, name)


def _backend(options: argparse.Namespace, model: str) -> Backend:
    place = Place.of(options)
    target = Target(
        url=place.url,
        model=model,
        api_key=options.api_key or os.environ.get("OPENAI_API_KEY", ""),
        headers=dict(options.header),
        sampling=sampling(options),
        ignore_eos=options.ignore_eos or dataset(options) != "sharegpt",
        timeout_s=options.timeout,
        with_text=options.save_detailed,
    )
    if options.backend == "baton":
        from bench.serve.native import NativeBackend  # grpc takes a while to import

        return NativeBackend(target)
    return OpenAIBackend(target, place.path)


async def _warm_up(backend: Backend, asks: Sequence[Ask], options: argparse.Namespace) -> None:
    """Send some requests first. Raises Unavailable if one fails."""
    num = options.num_warmups
    load = Load(backend, [asks[i % len(asks)] for i in range(num)], [0.0] * num, options.max_concurrency, prefix="warmup-")
    try:
        async with asyncio.timeout(_MAX_WARMUP_S):
            answers = await load.run()
    except TimeoutError as error:
        raise Unavailable(f"the warm-up has not ended after {_MAX_WARMUP_S:g} s", stage="client") from error
    if failed := [answer.error for answer in answers if answer.error]:
        raise Unavailable(f"{len(failed)} of {num} warm-up requests failed: {failed[0]}", stage="client")


def _said(options: argparse.Namespace) -> str:
    most = f", at most {options.max_concurrency} at once" if options.max_concurrency else ""
    return f"{options.dataset_name}, {options.num_prompts} requests at {options.request_rate:g}/s{most}"
