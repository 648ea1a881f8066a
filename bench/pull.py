"""`python -m bench.pull`: what pulling costs on a running cluster of one prefill and one decode node on this machine.

Prompts come one after the other, so that nothing but their own prefill can hide a pull. Beside the bench's own clock it reads the
cluster's counters (/metrics) and the processor time of its ranks. Asserts nothing.

Exposed is what a client waits for because its prompt was computed elsewhere: from decode's receipt of the last announcement to its last
verified read (the cluster's figure), and, with the announcement's way and the admission in it, how much later than the third token after
the second the second comes after the first (the client's).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from baton.client import SyncClient
from bench.machine import Machine
from bench.micro.report import save, table
from bench.micro.row import Row
from cluster.offline import Engine

RESULTS = Path(__file__).resolve().parent / "results" / "micro.json"
DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"
SCRAPE_S = 10.0
_NUM_WARM = 2
_NUM_TOKENS = 4
Counters = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """One prompt at its client: seconds to the first token, from it to the second, and from that to the third."""

    first_s: float
    second_s: float
    third_s: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What a number of prompts cost the cluster, per prompt. Seconds; cpu: of a role's processes."""

    prefill_s: float
    pull_s: float
    exposed_s: float
    pulled_bytes: float
    prefill_cpu_s: float
    decode_cpu_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """See --help."""
    parser = argparse.ArgumentParser(prog="python -m bench.pull", description="What pulling costs on a running cluster.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint directory (default: the demo's)")
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[2000, 50], help="tokens per prompt (default: 2000 50)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each length (default: %(default)s)")
    parser.add_argument("--transport", choices=["auto", "shm", "tcp"], default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of the cluster")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are kept as JSON (%(default)s)")
    asked = parser.parse_args(arguments)
    settings = {"transfer.transport": asked.transport, **dict(item.split("=", 1) for item in asked.set)}
    machine, found = str(Machine.this()), list[Row]()
    print(machine, flush=True)
    with Engine(asked.model, settings) as engine, SyncClient(engine.info.grpc) as client:
        for prompt_len in asked.prompt_lens:
            rows = list(measured(engine, client, prompt_len, asked.prompts))
            print(f"\nprompts of {prompt_len} tokens, {asked.prompts} one after the other\n{table(rows)}", flush=True)
            found += rows
    save(asked.output, machine, {f"pull {asked.transport}": found})


def measured(engine: Engine, client: SyncClient, prompt_len: int, num_prompts: int) -> Iterator[Row]:
    """Prompts of one length, one after the other, each unlike all others."""
    draw = random.Random(prompt_len)
    prompts = [[draw.randrange(1, 1000) for _ in range(prompt_len)] for _ in range(num_prompts + _NUM_WARM)]
    for prompt in prompts[:_NUM_WARM]:
        asked(client, prompt)
    engine.wait_idle()
    before = counters(engine)
    seen = [asked(client, prompt) for prompt in prompts[_NUM_WARM:]]
    engine.wait_idle()
    return rows(f"{prompt_len} tokens", seen, spent(before, counters(engine), num_prompts))


def asked(client: SyncClient, prompt: list[int]) -> Seen:
    """One prompt, and when its tokens came."""
    at = [time.perf_counter()]
    for chunk in client.generate(prompt, max_tokens=_NUM_TOKENS, ignore_eos=True, temperature=0.0):
        at += [time.perf_counter()] * len(chunk.token_ids)
    assert len(at) == _NUM_TOKENS + 1, "a token per step"
    return Seen(at[1] - at[0], at[2] - at[1], at[3] - at[2])


def counters(engine: Engine) -> Counters:
    """The sums of /metrics by name, prefill's apart from decode's, and processor seconds by role."""
    with urllib.request.urlopen(f"http://{engine.info.http}/metrics", timeout=SCRAPE_S) as answer:
        text = answer.read().decode()
    sums = defaultdict[str, float](float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            role = sample.labels.get("node", "").partition("-")[0]
            sums[f"{role} {sample.name}".strip()] += sample.value
    for rank in engine.counts():
        sums[f"{rank.node.partition('-')[0]} cpu"] += rank.cpu_seconds
    return sums


def spent(before: Counters, after: Counters, num_prompts: int) -> Spent:
    """The difference of two readings, per prompt."""

    def each(name: str) -> float:
        return (after.get(name, 0.0) - before.get(name, 0.0)) / num_prompts

    return Spent(
        prefill_s=each("prefill baton_step_seconds_sum"),
        pull_s=each("decode baton_pull_seconds_sum"),
        exposed_s=each("decode baton_pull_exposed_seconds_sum"),
        pulled_bytes=each("decode baton_pulled_bytes_total"),
        prefill_cpu_s=each("prefill cpu"),
        decode_cpu_s=each("decode cpu"),
    )


def rows(what: str, seen: Sequence[Seen], cost: Spent) -> Iterator[Row]:
    """Per prompt: seconds as the cluster counts them, then as a client sees them."""
    delay_s = statistics.median(each.second_s - each.third_s for each in seen)
    yield Row(f"{what}: prefill steps", 1e3 * cost.prefill_s, "ms")
    yield Row(f"{what}: time to first token", 1e3 * statistics.median(each.first_s for each in seen), "ms")
    yield Row(f"{what}: pulled", cost.pulled_bytes / 1e6, "MB")
    yield Row(f"{what}: exposed, decode's figure", 1e3 * cost.exposed_s, "ms", 1e3 * cost.prefill_s, "prefill")
    yield Row(f"{what}: exposed, client's figure", 1e3 * delay_s, "ms", 1e3 * cost.prefill_s, "prefill")
    if cost.exposed_s > 0:
        yield Row(f"{what}: bytes over exposed time", cost.pulled_bytes / cost.exposed_s / 1e9, "GB/s")
    yield Row(f"{what}: processor time of prefill", 1e3 * cost.prefill_cpu_s, "ms", 1e3 * cost.prefill_s, "steps")
    yield Row(f"{what}: processor time of decode", 1e3 * cost.decode_cpu_s, "ms")


if __name__ == "__main__":
    main()
