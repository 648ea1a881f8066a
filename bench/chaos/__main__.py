"""`python -m bench.chaos`: a cluster under load while its processes are killed and stopped and its sockets cut.

Exit codes: 0 every promise held, 1 one was broken, 2 the arguments or the model cannot work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from rich.console import Console

from baton.config import BatonConfig, load_config
from baton.errors import BatonError, ConfigError
from bench.chaos.asks import Asked, draw
from bench.chaos.faults import USUAL, Fault, Kind, plan
from bench.chaos.judge import doubts, judged
from bench.chaos.raylets import raylets
from bench.chaos.report import Result, Setup, print_result
from bench.chaos.run import Disturbance, Settings, undisturbed
from bench.chaos.said import Said, Try, flaw_of
from bench.chaos.scene import Scene
from bench.chaos.strike import Do
from bench.chaos.ties import undecided
from bench.display import Stages
from bench.machine import Machine
from bench.text import read_tokens
from cluster.kept import KeptCluster
from cluster.serve import first_signal_interrupts

_PROVEN_S = 60.0
# Small pools, so that they can be full; reservations that are outgrown; a client that does not read is not waited for long.
_SHAPE: dict[str, object] = {
    "prefill.nodes": 2,
    "decode.nodes": 2,
    "kv_memory": "24MiB",
    "max_model_len": 1024,
    "decode.reserve_output_tokens": 32,
    "router.slow_client_s": 6.0,
    "router.http_port": 0,
    "router.grpc_port": 0,
    "log_level": "warning",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        with first_signal_interrupts():
            result = run(options, console)
    except BatonError as error:
        print(f"bench.chaos: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    print_result(Console(), result)
    if options.json is not None:
        options.json.write_text(json.dumps({**asdict(result), "passed": result.findings.passed}, indent=1) + "\n", encoding="utf-8")
    return 0 if result.findings.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--requests", type=int, default=2000, metavar="N", help="requests in all (2000)")
    add("--faults", type=int, default=100, metavar="N", help="faults in all, spread over the requests (100)")
    add("--kinds", type=_kinds, default=USUAL, metavar="A,B", help=f"of {','.join(Kind)} (all but raylet)")
    add("--concurrency", type=int, default=16, metavar="N", help="clients at the same time (16)")
    add("--burst", type=int, default=24, metavar="N", help="long requests that come at once where pools are to be full (24)")
    add("--output", type=_range, default=(16, 64), metavar="A-B", help="output tokens of a request (16-64)")
    add("--deadline", type=float, default=60.0, metavar="S", help="deadline of every request, seconds (60)")
    add("--overlap", type=float, default=0.1, metavar="SHARE", help="share of faults after which the next comes at once (0.1)")
    add("--seed", type=int, default=1, metavar="N", help="what is asked and what goes wrong are drawn from it (1)")
    add("--model", type=Path, default=Path("demo/model"), metavar="DIR", help="checkpoint (demo/model)")
    add("--text", type=Path, default=Path("demo/held_out.txt"), metavar="FILE", help="text that prompts are cut from")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: as many answers may differ as undisturbed runs do")
    add("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the cluster, say prefill.tp=2")
    add("--raylet", action="store_true", help="run on two raylets; one decode node is on the second, which is killed, too")
    add("--untimed", action="store_true", help="do not judge how long pauses are: the machine is not quiet")
    add("--json", type=Path, metavar="FILE", help="write everything there, too")
    return parser


def _kinds(text: str) -> tuple[Kind, ...]:
    try:
        return tuple(Kind(name.strip()) for name in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; known are {', '.join(Kind)}") from None


def _range(text: str) -> tuple[int, int]:
    """16-64 -> 16, 64."""
    least, _, most = text.partition("-")
    if not (least.isdecimal() and most.isdecimal() and 0 < int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16-64")
    return int(least), int(most)


def _setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not like prefill.tp=2")
    return name, yaml.safe_load(value)


def run(options: argparse.Namespace, console: Console) -> Result:
    """Everything the options ask for. Raises ConfigError for what cannot work, before anything starts, and what a launch failed with."""
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no folder {options.json.parent}")
    shape: dict[str, object] = {**_SHAPE, "model": str(options.model), "dtype": options.dtype, **dict(options.set)}
    kinds = (*options.kinds, Kind.RAYLET) if options.raylet else options.kinds
    with ExitStack() as stack:
        extra: dict[Kind, Do] = {}
        if options.raylet:
            pair = stack.enter_context(raylets(load_config(None, shape)))
            shape |= pair.settings
            extra[Kind.RAYLET] = pair.kill
        config = load_config(None, shape)
        text_ids = [int(token_id) for token_id in read_tokens(options.text, options.model)]
        asked = draw(text_ids, options.requests, options.burst, options.output, options.seed)
        faults = plan(options.faults, kinds, _ranks(config), options.seed, options.overlap)
        return _Runs(options, console, config, shape, asked, faults).all(extra)


def _ranks(config: BatonConfig) -> list[str]:
    prefill = [f"prefill-{node}/{rank}" for node in range(config.prefill.nodes) for rank in range(config.prefill.tp)]
    num_decode = config.decode.dp * config.decode.tp
    return [*prefill, *(f"decode-{node}/{rank}" for node in range(config.decode.nodes) for rank in range(num_decode))]


class _Runs:
    """The undisturbed runs and the disturbed one, on one cluster."""

    def __init__(
        self,
        options: argparse.Namespace,
        console: Console,
        config: BatonConfig,
        shape: Mapping[str, object],
        asked: Asked,
        faults: Sequence[Fault],
    ) -> None:
        self._options = options
        self._console = console
        self._config = config
        self._shape = shape
        self._asked = asked
        self._faults = faults

    def all(self, extra: Mapping[Kind, Do]) -> Result:
        """Start the cluster, run, take it down."""
        with KeptCluster(self._config) as cluster, Stages() as stages:
            advance = stages("starting the cluster", 1)
            cluster.start(lambda event: None)
            advance(1)
            return asyncio.run(self._on(cluster, stages, extra))

    async def _on(self, cluster: KeptCluster, stages: Stages, extra: Mapping[Kind, Do]) -> Result:
        assert cluster.info is not None
        options, asked = self._options, self._asked
        scene = Scene(cluster, self._config)
        if missing := await scene.whole(_PROVEN_S):
            raise ConfigError(f"the cluster does not come into service as a whole: {missing}")
        settings = Settings(cluster.info.grpc, cluster.info.http, options.concurrency, options.deadline, not options.untimed)
        began_s = time.monotonic()
        expected = await undisturbed(settings, asked.all, stages("undisturbed run", len(asked.all)))
        calm_s = time.monotonic() - began_s
        num_differing = None
        if options.dtype != "float32":
            again = await undisturbed(settings, asked.all, stages("once more undisturbed", len(asked.all)))
            num_differing = sum(_differs(expected[number], said) for number, said in again.items())
        began_s = time.monotonic()
        disturbance = Disturbance(settings, scene, asked, self._faults, self._say, stages("under faults", len(asked.asks)))
        await disturbance.run(extra)
        seen, took_s = disturbance.seen(expected, num_differing), time.monotonic() - began_s
        if num_differing is None and (open_questions := doubts(seen)):
            seen = replace(seen, ties=undecided(options.model, open_questions))
        return Result(self._setup(), calm_s, took_s, num_differing, tuple(seen.records), judged(seen))

    def _say(self, line: str) -> None:
        self._console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def _setup(self) -> Setup:
        options = self._options
        return Setup(
            machine=Machine.this(),
            model=str(options.model),
            dtype=options.dtype,
            config={name: value for name, value in self._shape.items() if name not in ("model", "dtype") and not name.startswith("ray.")},
            num_requests=options.requests,
            num_faults=options.faults,
            kinds=tuple(kind.value for kind in options.kinds),
            concurrency=options.concurrency,
            deadline_s=options.deadline,
            seed=options.seed,
            overlap=options.overlap,
            timed=not options.untimed,
        )


def _differs(expected: Said, found: Said) -> bool:
    return flaw_of(expected, Try(0.0, 0.0, found), exact=False) is not None


if __name__ == "__main__":
    sys.exit(main())
