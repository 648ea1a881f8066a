"""What is no load on two servers: transformers batch by batch, streams under prompts, the bound of the FLOPs. Knows how to run them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.client import connect
from baton.errors import InternalError
from bench.suite.compare import Bench, Peer
from bench.suite.program import output_of
from bench.suite.rows import ROWS
from bench.suite.servers import Server, baton
from bench.suite.spent import cpu_seconds
from bench.suite.streams import Scene, Streams

_RUN_S = 900.0
_DRAIN_S = 30.0
_OTHER_SEEDS = 10**6
_LEAST_STREAM = 200  # shorter ones hardly ever run all at once
LOADED = ROWS[0]  # the load at which a machine is full


def generate(bench: Bench) -> list[dict[str, Any]]:
    """Baton, transformers, Baton, transformers …: output tokens per second of the same prompts."""
    rounds: list[dict[str, Any]] = []
    model, num = bench.models / LOADED.model, bench.prompts(LOADED)
    lengths = ["--input-len", str(LOADED.input_len), "--output-len", str(LOADED.output_len)]
    for number in range(1, bench.rounds + 1):
        with Server(baton(model), bench.logs) as server:
            rounds.append({"system": "baton", "round": number, **bench.loaded(LOADED, server.command, number)})
        batch = ["--batch", str(min(LOADED.concurrency, num)), "--num-prompts", str(num), "--seed", str(number)]
        rounds.append({"system": "transformers", "round": number, **_json_of("bench.suite.generate", str(model), *lengths, *batch)})
        bench.say("transformers " + ", ".join(f"{found['system']} {found['output_throughput']:.0f} tok/s" for found in rounds[-2:]))
    return rounds


def disturbed(bench: Bench, peer: Peer | None) -> list[dict[str, Any]]:
    """Streams under prompts: Baton, Baton with its prefill node drained (one process does both), and the peer."""
    rounds: list[dict[str, Any]] = []
    model = bench.models / LOADED.model
    scene = scene_of(bench.scale)
    for number in range(1, bench.rounds + 1):
        for system in ("baton", "baton, colocated"):
            with Server(baton(model), bench.logs) as server:
                if system != "baton":
                    _colocate(server)
                rounds.append(_streams(system, number, server, model, scene))
            bench.say(_line(rounds[-1]))
        if peer is not None:
            with peer.running() as (server, _):
                rounds.append(_streams("vllm", number, server, model, scene))
            bench.say(_line(rounds[-1]))
    return rounds


def _colocate(server: Server) -> None:
    """Take the prefill node out of service and end its processes: the decode node computes prompts itself, in its own steps."""
    with connect(f"127.0.0.1:{server.command.grpc_port}") as client:
        if not client.drain("prefill-0", _DRAIN_S, retire=True).idle:
            raise InternalError("the prefill node is not idle, and nothing runs", stage="bench")


def _streams(system: str, number: int, server: Server, model: Path, scene: Scene) -> dict[str, Any]:
    found = Streams(server.command.url, model, scene, seed=number).measured()
    return {"system": system, "round": number, **found}


def _line(found: dict[str, Any]) -> str:
    gaps = f"{found['undisturbed_p99_itl_ms']:.1f} -> {found['disturbed_p99_itl_ms']:.1f} ms"
    prompts = f"{found['prompts_offered_per_s']:.2f} of {found['prompts_possible_per_s']:.2f} prompts/s"
    return f"disaggregation round {found['round']} {found['system']}: p99 ITL {gaps} under {prompts}"


def bounded(bench: Bench) -> list[dict[str, Any]]:
    """The bound, measured before and after each round of Baton under the load that fills the machine, and where the CPU time went.

    cpu_*_s: seconds of the parts of Baton during the load. gemm_s: core seconds that the load's matrix products alone take.
    """
    model, rounds = bench.models / LOADED.model, list[dict[str, Any]]()
    for number in range(1, bench.rounds + 1):
        before = _bound(model, bench.prompts(LOADED))
        with Server(baton(model), bench.logs) as server:
            bench.loaded(LOADED, server.command, number)
            earlier = cpu_seconds(server)
            figures = bench.ruler.measured(LOADED, model, server.command.url, bench.prompts(LOADED), number + _OTHER_SEEDS)
            spent = {part: seconds - earlier[part] for part, seconds in cpu_seconds(server).items()}
        best = max(before, _bound(model, bench.prompts(LOADED)), key=lambda found: found["peak_gflops"])
        shares = {
            "share": figures["output_throughput"] / best["tokens_per_s"],
            "gemm_share": best["gemm_s"] / (spent["prefill"] + spent["decode"]),
        }
        cpu = {f"cpu_{part}_s": seconds for part, seconds in spent.items()}
        rounds.append({"system": "baton", "round": number, **figures, **best, **cpu, **shares})
        reached = f"{figures['output_throughput']:.0f} of {best['tokens_per_s']:.0f} tok/s"
        bench.say(
            f"bound round {number}: {reached} at {best['peak_gflops']:.0f} GFLOP/s, products {shares['gemm_share']:.0%} of the ranks' CPU"
        )
    return rounds


def _bound(model: Path, num_prompts: int) -> dict[str, float]:
    load = {"input-len": LOADED.input_len, "output-len": LOADED.output_len, "batch": LOADED.concurrency, "num-prompts": num_prompts}
    return _json_of("bench.suite.flops", str(model), *(word for name, value in load.items() for word in (f"--{name}", str(value))))


def _json_of(module: str, *words: str) -> dict[str, float]:
    """What a program of ours prints last, in a process of its own."""
    printed = output_of(module, [sys.executable, "-m", module, *words], _RUN_S)
    found: dict[str, float] = json.loads(printed.strip().splitlines()[-1])
    return found


def scene_of(scale: float) -> Scene:
    """The experiment with streams. scale: of their length."""
    return replace(Scene(), stream_len=max(_LEAST_STREAM, round(Scene().stream_len * scale)))
