"""What `bench.w8a8` found, as one value and as tables. Knows figures; not how they were obtained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.agreement import Target
from bench.int8_speed import Limits, LinearTime, Speed
from bench.machine import Machine
from bench.quality import Comparison


@dataclass(frozen=True, slots=True)
class Setup:
    """What was compared on what. w8a8_model: as `model` where it was quantized while loading. Lengths in tokens."""

    machine: Machine
    model: str
    w8a8_model: str
    text: str
    num_prompts: int
    prompt_len: int
    num_positions: int
    num_windows: int
    window_len: int


@dataclass(frozen=True, slots=True)
class Result:
    """Everything. reference_perplexity: of bf16. speed: None if it was not asked for."""

    setup: Setup
    reference: str
    reference_perplexity: float
    comparisons: tuple[Comparison, ...]
    targets: tuple[Target, ...]
    speed: Speed | None

    @property
    def passed(self) -> bool:
        """Whether every target holds."""
        return all(target.holds for target in self.targets)


def print_result(console: Console, result: Result) -> None:
    """Tables, then the targets. Narrow enough for 80 columns."""
    setup = result.setup
    _say(console, str(setup.machine))
    _say(console, f"{setup.model} in bf16, w8a8 from {setup.w8a8_model}, text {setup.text}", "")
    _print_quality(console, result)
    if result.speed is not None:
        _print_speed(console, result.speed)
    for target in result.targets:
        console.print(str(target), style="green" if target.holds else "bold red", highlight=False)


def _print_quality(console: Console, result: Result) -> None:
    setup = result.setup
    table = _table("", "agreed\nforced", "\ntext", "perplexity\n", "\nratio", "prefix\nmean", "\nmedian", "\nwhole")
    table.add_row(result.reference, "", "", f"{result.reference_perplexity:.3f}")
    for found in result.comparisons:
        agreed = f"{found.forced.share:.2%}", f"{found.text.share:.2%}"
        perplexity = f"{found.perplexity:.3f}", f"{found.perplexity_ratio:.4f}"
        free = f"{found.free.mean:.1f}", f"{found.free.median:g}", f"{found.free.whole:.1%}"
        table.add_row(found.name, *agreed, *perplexity, *free)
    console.print(table)
    _say(
        console,
        f"Compared with {result.reference}. agreed: positions with the same most likely token",
        f"forced: fed its answers, {setup.num_prompts} x {setup.num_positions} positions after {setup.prompt_len} tokens of text",
        f"text: fed {setup.num_windows} windows of {setup.window_len} tokens, as for the perplexity",
        f"prefix: tokens until free-running answers differ; whole: all {setup.num_positions} are the same",
        "",
    )


def _print_speed(console: Console, speed: Speed) -> None:
    limits = speed.limits
    _say(
        console,
        f"Best seen in this run: memory {limits.memory_bytes_per_s / 1e9:.1f} GB/s, "
        f"bf16 {limits.bf16_rate / 1e9:.0f} GFLOP/s, int8 {limits.int8_rate / 1e9:.0f} GOP/s.",
        "limit: the time at the best rate or, where weights come from memory, to read them",
        "",
    )
    for cached, title in ((True, "of this model,\nweights in the caches"), (False, "of large models,\nweights from memory")):
        _print_linears(console, title, [time for time in speed.linears if time.shape.cached is cached], limits)
    steps = _table("decode step", "bf16 ms", "w8a8 ms", "int8 faster")
    for step in speed.steps:
        name = f"batch {step.batch}, {step.context_len} tokens each"
        steps.add_row(name, f"{step.bf16_s * 1e3:.2f}", f"{step.w8a8_s * 1e3:.2f}", f"{step.bf16_s / step.w8a8_s:.2f} x")
    console.print(steps)
    _say(console, "")


def _print_linears(console: Console, title: str, times: Sequence[LinearTime], limits: Limits) -> None:
    table = _table(title, "\nrows", "bf16\nGFLOP/s", "of\nlimit", "int8\nGOP/s", "of\nlimit", "int8\nfaster")
    for time in times:
        bf16 = f"{time.num_operations / time.bf16_s / 1e9:.1f}", f"{limits.bf16_share(time):.0%}"
        int8 = f"{time.num_operations / time.int8_s / 1e9:.1f}", f"{limits.int8_share(time):.0%}"
        name = f"{time.shape.name} {time.shape.out} x {time.shape.into}"
        table.add_row(name, str(time.num_rows), *bf16, *int8, f"{time.speedup:.2f} x")
    console.print(table)
    _say(console, "")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
