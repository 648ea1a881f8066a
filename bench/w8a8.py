"""`python -m bench.w8a8`: int8 weights and activations beside bf16, in what the model says and in how fast it says it.

Exit codes: 0 all targets hold, 1 one is missed, 2 the arguments or the model cannot work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from baton.engine.config_json import load_spec
from baton.engine.rank import set_threads
from baton.errors import BatonError, ConfigError
from bench import int8_speed
from bench.agreement import targets
from bench.display import Stages
from bench.int8_report import Result, Setup, print_result
from bench.machine import Machine
from bench.quality import Comparison, Reference, Stage, Subject, Task
from bench.solo import Solo
from bench.text import prompts, read_tokens, windows

_WINDOW_LEN = 512
_SEQUENCES_PER_STEP, _WINDOWS_PER_STEP = 64, 4
_OTHER_SEQUENCES_PER_STEP, _OTHER_WINDOWS_PER_STEP = 8, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    options = _parser().parse_args(argv)
    try:
        result = measured(options)
    except BatonError as error:
        print(f"bench.w8a8: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    print_result(Console(), result)
    if options.json is not None:
        options.json.write_text(json.dumps({**asdict(result), "passed": result.passed}, indent=1) + "\n", encoding="utf-8")
    return 0 if result.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.w8a8", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"), metavar="DIR", help="checkpoint to compute in bf16 and in int8")
    parser.add_argument("--w8a8", type=Path, metavar="DIR", help="ready quantized checkpoint of it; without, it is quantized while loading")
    parser.add_argument("--text", type=Path, default=Path("demo/held_out.txt"), metavar="FILE", help="a text the model was not trained on")
    parser.add_argument("--positions", type=_positions, default=(200, 64), metavar="QxP", help="prompts, and tokens after each (200x64)")
    parser.add_argument("--prompt-len", type=_positive, default=64, metavar="N", help="tokens of a prompt (64)")
    parser.add_argument("--windows", type=_positive, metavar="N", help=f"score only N windows of {_WINDOW_LEN} tokens, evenly spaced")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="compute threads (1)")
    parser.add_argument("--no-speed", action="store_true", help="measure only what the model says")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _positions(text: str) -> tuple[int, int]:
    """200x64 -> 200 prompts, 64 positions."""
    num_prompts, _, num_positions = text.partition("x")
    try:
        return _positive(num_prompts), _positive(num_positions)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 200x64") from None


def measured(options: argparse.Namespace) -> Result:
    """Everything the options ask for. Raises ConfigError if model, text and lengths do not fit, before computing anything."""
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no folder {options.json.parent}")
    set_threads(options.threads)
    task = _task(options)
    setup = Setup(
        machine=Machine.this(),
        model=str(options.model),
        w8a8_model=str(options.w8a8 or options.model),
        text=str(options.text),
        num_prompts=len(task.prompts),
        prompt_len=task.prompts.shape[1],
        num_positions=task.num_positions,
        num_windows=len(task.windows),
        window_len=task.windows.shape[1] - 1,
    )
    subjects = _subjects(options, task)
    with Stages() as stages:
        reference = Reference.of(subjects[0], task, _named(stages, subjects[0].name))
        found = tuple(Comparison.of(subject, reference, task, _named(stages, subject.name)) for subject in subjects[1:])
        speed = None if options.no_speed else _speed(subjects[0].open(), subjects[-1].open(), task, stages)
    wanted = targets(found[-1].forced, found[-1].perplexity_ratio)
    return Result(setup, subjects[0].name, reference.perplexity, found, wanted, speed)


def _task(options: argparse.Namespace) -> Task:
    num_prompts, num_positions = options.positions
    room = load_spec(options.model, "bfloat16", "none").max_position_embeddings
    if options.prompt_len + num_positions > room:
        raise ConfigError(f"--prompt-len {options.prompt_len} and {num_positions} positions are more than the model's {room}")
    if options.w8a8 is not None:
        _check_alike(options.model, options.w8a8)
    tokens = read_tokens(options.text, options.model)
    cut = prompts(tokens, num_prompts, options.prompt_len, options.prompt_len + num_positions)
    return Task(cut, num_positions, windows(tokens, options.windows, min(_WINDOW_LEN, room)))


def _check_alike(model: Path, quantized: Path) -> None:
    """Raise ConfigError unless `quantized` is an int8 checkpoint of a model like the one in `model`."""
    plain, other = load_spec(model, "bfloat16", "none"), load_spec(quantized, "bfloat16", "auto")
    if other.quantization != "w8a8":
        raise ConfigError(f"--w8a8 {quantized} is no int8 checkpoint; leave it out to quantize {model} while loading")
    if replace(other, quantization=None) != plain:
        raise ConfigError(f"--w8a8 {quantized} ({other.model_type}, vocabulary {other.vocab}) is another model than {model}")


def _subjects(options: argparse.Namespace, task: Task) -> tuple[Subject, ...]:
    """The reference first, what the targets are about last; between them what a bf16 model does to itself."""
    max_len = max(task.prompts.shape[1] + task.num_positions, task.windows.shape[1])
    opened = partial(Solo, max_rows=_SEQUENCES_PER_STEP, max_len=max_len)
    bf16 = partial(opened, options.model, "bfloat16", "none")
    usual, other = (_SEQUENCES_PER_STEP, _WINDOWS_PER_STEP), (_OTHER_SEQUENCES_PER_STEP, _OTHER_WINDOWS_PER_STEP)
    return (
        Subject(f"bf16, batch {usual[0]}", bf16, *usual),
        Subject(f"bf16, batch {other[0]}", bf16, *other),
        Subject(f"float32, batch {usual[0]}", partial(opened, options.model, "float32", "none"), *usual),
        Subject(f"w8a8, batch {usual[0]}", partial(opened, options.w8a8 or options.model, "bfloat16", "w8a8"), *usual),
    )


def _named(stages: Stages, subject: str) -> Stage:
    return lambda name, total: stages(f"{subject}: {name}", total)


def _speed(bf16: Solo, w8a8: Solo, task: Task, stages: Stages) -> int8_speed.Speed:
    context_len = task.prompts.shape[1] + task.num_positions
    return int8_speed.measured(bf16, w8a8, context_len, stages("speed", int8_speed.num_measurements(bf16.spec)))


if __name__ == "__main__":
    sys.exit(main())
