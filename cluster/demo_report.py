"""What happened in the demo, and whether it was right: tables and checks from plain values.

Knows: answers, the router's status and the ranks' counts. Does not know: how they were obtained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.request import Chunk, FinishReason, Usage
from cluster.messages import ClusterInfo
from ranks.facts import RankCounts


@dataclass(slots=True)
class Story:
    """One prompt and its answer as it arrives. State owner: the task that reads the stream; seconds count from submission."""

    prompt: str
    text: str = ""
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    served_by: tuple[str, ...] = field(default=())

    def add(self, chunk: Chunk, at_s: float) -> None:
        """Take the next chunk."""
        self.text += chunk.text
        self.num_tokens += len(chunk.token_ids)
        if chunk.token_ids:
            self.first_s = at_s if self.first_s is None else self.first_s
            self.last_s = at_s
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.usage = chunk.usage or self.usage
        self.served_by = chunk.served_by or self.served_by

    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 where there is no second."""
        elapsed_s = self.last_s - (self.first_s or 0.0)
        return (self.num_tokens - 1) / elapsed_s if elapsed_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be true."""

    holds: bool
    says: str


def checks(info: ClusterInfo, stories: Sequence[Story], status: Mapping[str, Any], counts: Sequence[RankCounts]) -> list[Check]:
    """Everything the demo claims."""
    answered = sum(story.finish_reason is not None and story.num_tokens > 0 for story in stories)
    counted = sum(story.usage is not None and story.usage.completion_tokens == story.num_tokens for story in stories)
    relayed = sum(_passed_the_baton(story) for story in stories)
    groups = {name for story in stories for name in story.served_by if name in _pulls(status)}
    pulled = sum(pulls["blocks_pulled"] for pulls in _pulls(status).values())
    balanced = sum(rank.idle() for rank in counts)
    return [
        Check(answered == len(stories), f"{answered} of {len(stories)} prompts were answered to the end"),
        Check(counted == len(stories), f"{counted} of {len(stories)} usages equal the tokens received"),
        Check(relayed == len(stories), f"{relayed} of {len(stories)} answers began on prefill and went on on decode"),
        Check(len(groups) == len(_pulls(status)), f"{len(groups)} of {len(_pulls(status))} decode groups took part"),
        Check(pulled > 0, f"{pulled} KV blocks were pulled from prefill by decode"),
        Check(
            balanced == len(counts) == len(info.ranks),
            f"{balanced} of {len(info.ranks)} ranks are idle: every block is free or cached, no lease, no pull",
        ),
    ]


def print_report(
    console: Console, info: ClusterInfo, stories: Sequence[Story], status: Mapping[str, Any], counts: Sequence[RankCounts]
) -> None:
    """Requests, ranks and pulls as tables."""
    console.print()
    console.print(_requests(stories))
    console.print(_speed(stories), highlight=False)
    console.print()
    console.print(_ranks(info, counts))
    console.print()
    for group, pulls in sorted(_pulls(status).items()):
        console.print(_pull_line(group, pulls), highlight=False)
    console.print()


def _passed_the_baton(story: Story) -> bool:
    roles = {name.split("-")[0] for name in story.served_by}
    return {"prefill", "decode"} <= roles


def _pulls(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group["pulls"] for group in status["groups"] if group["role"] == "decode"}


def _requests(stories: Sequence[Story]) -> Table:
    table = _table("prompt", "first token", "tokens", "per s", "end", "served by")
    for story in stories:
        first_ms = f"{story.first_s * 1000:.0f} ms" if story.first_s is not None else "-"
        end = story.finish_reason.value if story.finish_reason else "none"
        beginning = story.prompt.split("\n")[0][:20]
        table.add_row(beginning, first_ms, str(story.num_tokens), f"{story.tokens_per_s():.0f}", end, " → ".join(story.served_by))
    return table


def _speed(stories: Sequence[Story]) -> str:
    num_tokens = sum(story.num_tokens for story in stories)
    elapsed_s = max((story.last_s for story in stories), default=0.0)
    return f"{num_tokens} tokens in {elapsed_s:.1f} s: {num_tokens / elapsed_s if elapsed_s else 0:.0f} tokens/s over all streams"


def _ranks(info: ClusterInfo, counts: Sequence[RankCounts]) -> Table:
    table = _table("process", "pid", "steps", "CPU s", "free + cached + held + quar.", "leases", "pulls")
    for rank in counts:
        blocks = f"{rank.free} + {rank.cached} + {rank.held} + {rank.quarantined} = {rank.total}"
        shown = [blocks, str(rank.open_leases), str(rank.open_pulls)] if rank.leader else ["as its leader says"]
        table.add_row(f"{rank.node}/{rank.rank}", str(rank.pid), str(rank.steps), f"{rank.cpu_seconds:.1f}", *shown)
    table.add_row("router", str(info.router_pid))
    return table


def _table(*columns: str) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _pull_line(group: str, pulls: Mapping[str, Any]) -> str:
    transport = f" over {pulls['transport']}" if pulls.get("transport") else ""
    mib = pulls["bytes_pulled"] / 2**20
    return (
        f"{group}: {pulls['pulls']} pulls{transport}, {pulls['blocks_pulled']} blocks and {mib:.2f} MiB pulled, "
        f"{pulls['blocks_matched']} blocks found at home"
    )
