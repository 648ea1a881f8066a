"""`make demo`: the demo model in the full shape, prefill tp=2 -> decode dp=2 with its experts over both ranks, and what happened there.

Exit code 0 only if every check of demo_report.py holds. Knows: the public gRPC client and a kept cluster. Does not know: Ray, torch.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from baton.client import Client, Options
from baton.config import BatonConfig, load_config
from baton.errors import BatonError
from cluster.demo_report import Check, Story, checks, print_report
from cluster.display import LaunchDisplay
from cluster.kept import KeptCluster
from cluster.messages import ClusterInfo
from cluster.serve import first_signal_interrupts
from ranks.facts import RankCounts

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
_PROMPTS = (
    'import os\n\ndef read_config(path, encoding="utf-8"):\n    """Read a configuration file and return',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n\n    def put(self, item):\n",
    "The with statement is used to wrap the execution of a block with methods defined by a context manager.",
    "import sys\nimport argparse\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser(",
    'def parse_header(line):\n    """Parse a header line of the form "name: value" and return',
    "A function definition defines a user-defined function object. A function definition is an executable statement.",
)
_SAMPLING: Options = {"max_tokens": 96, "min_tokens": 16, "temperature": 0.7, "top_p": 0.9, "timeout_s": 60.0}
_PATIENCE_S = 15.0
_REFRESH_PER_S = 8

T = TypeVar("T")


def main() -> int:
    """Run the demo in this terminal."""
    console = Console()
    began_s = time.monotonic()
    try:
        with first_signal_interrupts():
            found = asyncio.run(_demo(console))
    except KeyboardInterrupt:
        return 130
    except BatonError as error:
        console.print(f"the demo failed: {error.message}", style="red", markup=False, highlight=False)
        for note in error.__notes__ if "__notes__" in vars(error) else []:
            console.print(note, markup=False, highlight=False, style="dim")
        return 1
    for check in found:
        console.print(f"[{'green' if check.holds else 'red'}]{'✓' if check.holds else '✗'}[/] {check.says}", highlight=False)
    console.print(f"[dim]{time.monotonic() - began_s:.0f} s in all[/]")
    return 0 if all(check.holds for check in found) else 1


def demo_config() -> BatonConfig:
    """The shape of the demo: five processes, two of prefill, two of decode, one router."""
    return load_config(
        None,
        {
            "model": str(MODEL),
            "served_model_name": "demo",
            "kv_memory": "32MiB",
            "prefill.tp": 2,
            "decode.dp": 2,
            "prefill.max_step_tokens": 256,
            "decode.max_prompt_tokens": 0,  # every prompt goes the whole way: that is what is to be seen
            "router.http_port": 0,
            "router.grpc_port": 0,
            "log_level": "warning",
        },
    )


async def _demo(console: Console) -> list[Check]:
    console.print("[bold]Baton[/]: prefill (tp 2) → decode (dp 2, experts over both), router: five processes of our own, held by Ray")
    with KeptCluster(demo_config()) as cluster:
        with LaunchDisplay(console) as display:
            info = cluster.start(display)
        _wait_all_proven(cluster)
        console.print(
            f"serving on [cyan]http://{info.http}[/] and [cyan]grpc://{info.grpc}[/]; submitting {len(_PROMPTS)} prompts at once\n"
        )
        stories = await _tell(info, console)
        counts = _idle_counts(cluster)
        status = cluster.status()
    print_report(console, info, stories, status, counts)
    return [*checks(info, stories, status, counts), _all_ended(info)]


async def _tell(info: ClusterInfo, console: Console) -> list[Story]:
    """All prompts at once over gRPC, shown as they are answered."""
    stories = [Story(prompt) for prompt in _PROMPTS]
    with Live(get_renderable=lambda: _picture(stories, console), console=console, refresh_per_second=_REFRESH_PER_S) as live:
        async with Client(info.grpc) as client:
            await asyncio.gather(*(_answer(client, story, number) for number, story in enumerate(stories)))
        live.refresh()
    return stories


async def _answer(client: Client, story: Story, seed: int) -> None:
    asked: Options = {**_SAMPLING, "seed": seed}
    began_s = time.monotonic()
    async for chunk in client.generate(story.prompt, **asked):
        story.add(chunk, time.monotonic() - began_s)


def _picture(stories: Sequence[Story], console: Console) -> Group:
    return Group(
        *(Panel(_text(story), border_style="dim" if story.finish_reason else "cyan", width=min(100, console.width)) for story in stories)
    )


def _text(story: Story) -> Text:
    return Text.assemble((story.prompt, "bold"), (story.text, ""))


def _wait_all_proven(cluster: KeptCluster) -> None:
    """A cluster serves once one pair is proven; the demo wants all of them to take part. A check fails later if they do not."""
    _until(cluster.status, lambda status: all(pair["usable"] for pair in status["pairs"]))


def _idle_counts(cluster: KeptCluster) -> list[RankCounts]:
    """What every rank holds once nothing runs; or after _PATIENCE_S, and then a check will fail."""
    return _until(cluster.counts, lambda counts: all(rank.idle() for rank in counts))


def _until(ask: Callable[[], T], enough: Callable[[T], bool]) -> T:
    end_s = time.monotonic() + _PATIENCE_S
    while not enough(answer := ask()) and time.monotonic() < end_s:
        time.sleep(0.1)
    return answer


def _all_ended(info: ClusterInfo) -> Check:
    left = [pid for pid in (info.router_pid, *(rank.pid for rank in info.ranks)) if psutil.pid_exists(pid)]
    return Check(not left, f"no process is left (still there: {left})" if left else "no process is left")


if __name__ == "__main__":
    sys.exit(main())
