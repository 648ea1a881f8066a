"""What `bench.w8a8` found, as one value and as tables. Knows figures; not how they were obtained."""

from __future__ import annotations

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
    """Tables, then the targets."""
    setup = result.setup
    console.print(f"{setup.machine}", highlight=False, markup=False)
    console.print(f"{setup.model} in bf16; w8a8 from {setup.w8a8_model}; text {setup.text}\n", highlight=False, markup=False)
    _print_quality(console, result)
    if result.speed is not None:
        _print_speed(console, result.speed)
    for target in result.targets:
        console.print(str(target), style="green" if target.holds else "bold red", highlight=False)


def _print_quality(console: Console, result: Result) -> None:
    setup = result.setup
    table = _table(
        "compared with\n" + result.reference,
        "same token\nforced",
        "\non text",
        "perplexity\n",
        "\nratio",
        "same beginning\nmean",
        "\nmedian",
        "\nwhole",
    )
    table.add_row(result.reference, "", "", f"{result.reference_perplexity:.4f}")
    for found in result.comparisons:
        agreed = f"{found.forced.share:.2%}", f"{found.text.share:.2%}"
        perplexity = f"{found.perplexity:.4f}", f"{found.perplexity_ratio:.4f}"
        free = f"{found.free.mean:.1f}", f"{found.free.median:g}", f"{found.free.whole:.1%}"
        table.add_row(found.name, *agreed, *perplexity, *free)
    console.print(table)
    for line in (
        f"forced: fed the reference's own answers, {setup.num_prompts} x {setup.num_positions} positions after {setup.prompt_len} of text",
        f"on text: {setup.num_windows} windows of {setup.window_len} tokens of it, also for the perplexity",
        f"same beginning: tokens until free-running answers differ, of {setup.num_positions}; whole: never",
    ):
        console.print(line, style="dim", highlight=False)
    console.print()


def _print_speed(console: Console, speed: Speed) -> None:
    limits = speed.limits
    console.print(
        f"best seen in this run: memory {limits.memory_bytes_per_s / 1e9:.1f} GB/s, "
        f"bf16 {limits.bf16_rate / 1e9:.0f} GFLOP/s, int8 {limits.int8_rate / 1e9:.0f} GOP/s\n",
        highlight=False,
    )
    table = _table("linear map\n", "\nrows", "bf16\nGFLOP/s", "\nof limit", "int8\nGOP/s", "\nof limit", "int8 is\nfaster by")
    for time in speed.linears:
        table.add_row(*_linear(time, limits))
    console.print(table)
    console.print("of limit: reading the weights at memory's rate or the best rate seen; maps of the model itself stay in the caches\n")
    steps = _table("decode step", "bf16 ms", "w8a8 ms", "w8a8 is faster by")
    for step in speed.steps:
        name = f"batch {step.batch}, {step.context_len} tokens each"
        steps.add_row(name, f"{step.bf16_s * 1e3:.2f}", f"{step.w8a8_s * 1e3:.2f}", f"{step.bf16_s / step.w8a8_s:.2f} x")
    console.print(steps)
    console.print()


def _linear(time: LinearTime, limits: Limits) -> tuple[str, ...]:
    shape = time.shape
    bf16 = f"{time.num_operations / time.bf16_s / 1e9:.1f}", f"{limits.bf16_share(time):.0%}"
    int8 = f"{time.num_operations / time.int8_s / 1e9:.1f}", f"{limits.int8_share(time):.0%}"
    name = f"{shape.name} {shape.out} x {shape.into}{', cached' if shape.cached else ''}"
    return name, str(time.num_rows), *bf16, *int8, f"{time.speedup:.2f} x"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
