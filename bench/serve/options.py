"""The options of `baton bench serve`: names and defaults of vLLM's `bench serve`, and SGLang's where only that has one. Knows argparse."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from bench.serve.names import GOALS, SERIES

_PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions", "baton": ""}
_DATASETS = {"random": "random", "sharegpt": "sharegpt", "mooncake-trace": "mooncake", "prefix": "prefix"}
_DATASETS |= {"mooncake": "mooncake", "prefix_repetition": "prefix"}  # the names that others give them
_SAMPLING: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("temperature", float),
    ("top_p", float),
    ("top_k", int),
    ("min_p", float),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them, in groups."""
    _add_server(parser.add_argument_group("server").add_argument)
    _add_traffic(parser.add_argument_group("traffic").add_argument)
    _add_dataset(parser.add_argument_group("data set").add_argument)
    _add_results(parser.add_argument_group("results").add_argument)


def _add_server(add: Callable[..., object]) -> None:
    add("--backend", choices=tuple(_PATHS), default="openai", help="openai: completions; openai-chat: chat; baton: gRPC (default openai)")
    add("--base-url", metavar="URL", help="http://host:port, or host:port with --backend baton; wins over --host and --port")
    add("--host", default="127.0.0.1", help="host of the server (default 127.0.0.1)")
    add("--port", type=int, help="port of the server (default 8000, with --backend baton 8001)")
    add("--endpoint", metavar="PATH", help="path of the API (default: the backend's)")
    add("--header", type=_pair, nargs="*", default=[], metavar="KEY=VALUE", help="headers to send with every request")
    add("--api-key", metavar="KEY", help="key to present (default: $OPENAI_API_KEY)")
    add("--model", metavar="NAME", help="model as the server calls it; also where the tokenizer is (default: the first one served)")
    add("--served-model-name", metavar="NAME", help="what to call the model, where --model is only the tokenizer's place")
    add("--tokenizer", metavar="DIR", help="checkpoint directory or hub name whose tokenizer to use (default: --model)")
    for name, kind in _SAMPLING:
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="sampling, as the API has it (default: the server's)")
    add("--extra-body", type=_object, default={}, metavar="JSON", help="more fields for every request")
    add("--ignore-eos", action="store_true", help="generate exactly the tokens asked for; always on but for sharegpt")
    add("--timeout", type=float, default=6 * 3600.0, metavar="S", help="seconds one request may take (default 6 h, as in vLLM)")


def _add_traffic(add: Callable[..., object]) -> None:
    add("--num-prompts", type=_positive, default=1000, metavar="N", help="requests (default 1000)")
    add("--request-rate", type=_rate, default=float("inf"), metavar="R", help="requests/s, at random times; inf: all at once (default inf)")
    add("--burstiness", type=_rate, default=1.0, metavar="B", help="1 is Poisson, less burstier, inf a metronome (default 1)")
    add("--max-concurrency", type=_positive, metavar="N", help="hold requests back while N run; without it nothing is held back")
    add("--num-warmups", type=int, default=0, metavar="N", help="requests before the run that are not counted (default 0)")
    add("--seed", type=int, default=0, help="prompts and arrivals are drawn from it (default 0)")
    add("--disable-tqdm", action="store_true", help="no progress bar; there is none either where nobody watches")
    add("--request-id-prefix", default="bench-", metavar="TEXT", help="beginning of request ids (default bench-)")


def _add_dataset(add: Callable[..., object]) -> None:
    add("--dataset-name", choices=tuple(_DATASETS), default="random", help="(default random)")
    add("--dataset-path", type=Path, metavar="FILE", help="file of sharegpt or mooncake-trace")
    add("--tokenize-prompt", action="store_true", help="send token ids instead of text")
    add("--random-input-len", "--input-len", type=_positive, default=1024, metavar="N", help="tokens of a prompt (default 1024)")
    add("--random-output-len", "--output-len", type=_positive, default=128, metavar="N", help="tokens of an answer (default 128)")
    add(
        "--random-range-ratio",
        type=_ratio,
        default=(0.0, 0.0),
        metavar="R",
        help='lengths vary by this share; or {"input": R, "output": R}',
    )
    add("--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all prompts begin with, in addition (default 0)")
    add("--prefix-repetition-prefix-len", "--gsp-system-prompt-len", type=int, default=256, metavar="N", help="prefix: tokens shared (256)")
    add("--prefix-repetition-suffix-len", "--gsp-question-len", type=int, default=256, metavar="N", help="prefix: tokens of its own (256)")
    add("--prefix-repetition-num-prefixes", "--gsp-num-groups", type=int, default=10, metavar="N", help="prefix: different prefixes (10)")
    add(
        "--prefix-repetition-output-len", "--gsp-output-len", type=_positive, default=128, metavar="N", help="prefix: answer's tokens (128)"
    )
    add("--sharegpt-output-len", type=_positive, metavar="N", help="sharegpt: tokens of every answer (default: as recorded)")
    add("--mooncake-slowdown-factor", type=float, default=1.0, metavar="X", help="trace: 2 takes twice the time (default 1)")
    add("--mooncake-length-scale", type=float, default=1.0, metavar="X", help="trace: multiply all lengths (default 1)")
    add("--mooncake-block-size", type=_positive, default=512, metavar="N", help="trace: tokens a hash stands for (default 512)")
    add("--self-timed", action=argparse.BooleanOptionalAction, default=True, help="trace: arrivals as recorded, not by --request-rate")


def _add_results(add: Callable[..., object]) -> None:
    add("--percentile-metrics", type=_series, default=("ttft", "tpot", "itl", "e2el"), metavar="A,B", help=f"of {','.join(SERIES)}")
    add("--metric-percentiles", type=_percentiles, default=(90.0, 99.0), metavar="P,Q", help="percentiles to report (default 90,99)")
    add("--goodput", type=_goal, nargs="+", default=[], metavar="NAME:MS", help=f"count requests that meet all of them; {', '.join(GOALS)}")
    add("--save-result", action="store_true", help="write the figures as JSON")
    add("--save-detailed", action="store_true", help="with --save-result: every request's times and text, too")
    add("--append-result", action="store_true", help="with --save-result: add a line to the file")
    add("--result-dir", type=Path, metavar="DIR", help="where to write it (default: here)")
    add("--result-filename", metavar="NAME", help="(default {label}-{rate}qps-{model}-{date}.json)")
    add("--label", metavar="TEXT", help="name of the run in file and JSON (default: the backend)")
    add("--metadata", type=_pair, nargs="*", default=[], metavar="KEY=VALUE", help="more to write into the JSON")
    add("--plot", type=Path, metavar="FILE.svg", help="draw latency distributions and throughput over time")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server is, as the options say it."""

    url: str
    path: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> Place:
        """By the backend's defaults. Raises ConfigError for what cannot be an address."""
        grpc = options.backend == "baton"
        port = options.port if options.port is not None else 8001 if grpc else 8000
        url = options.base_url or (f"{options.host}:{port}" if grpc else f"http://{options.host}:{port}")
        if grpc and "/" in url:
            raise ConfigError(f"--backend baton takes host:port of the gRPC door, not {url}")
        return cls(url.rstrip("/"), options.endpoint or _PATHS[options.backend])


def dataset(options: argparse.Namespace) -> str:
    """Which data set, by its one name here: random, sharegpt, mooncake or prefix. ConfigError where a file is missing or too much."""
    name = _DATASETS[options.dataset_name]
    needs = name in ("sharegpt", "mooncake")
    if needs and options.dataset_path is None:
        raise ConfigError(f"--dataset-name {options.dataset_name} needs its file: --dataset-path FILE")
    if not needs and options.dataset_path is not None:
        raise ConfigError(f"--dataset-name {options.dataset_name} is made here and reads no --dataset-path")
    return name


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What every request says about sampling, and --extra-body."""
    given = vars(options)
    return {**{name: given[name] for name, _ in _SAMPLING if given[name] is not None}, **options.extra_body}


def goals(options: argparse.Namespace) -> Mapping[str, float]:
    """Milliseconds by name."""
    return dict(options.goodput)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number over 0")
    return rate


def _ratio(text: str) -> tuple[float, float]:
    """0.3, or {"input": 0.3, "output": 0.5}."""
    try:
        said = json.loads(text)
        return (float(said), float(said)) if not isinstance(said, dict) else (float(said["input"]), float(said["output"]))
    except (ValueError, TypeError, KeyError):
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number nor like {{"input": 0.3, "output": 0.5}}') from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not like KEY=VALUE")
    return name.strip(), value.strip()


def _object(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(said, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return said


def _series(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in SERIES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; known are {', '.join(SERIES)}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= value <= 100 for value in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 50,90,99")
    return found


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    try:
        limit_ms = float(limit)
    except ValueError:
        limit_ms = -1.0
    if name not in GOALS or limit_ms < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like ttft:500; goals are milliseconds for {', '.join(GOALS)}")
    return name, limit_ms
