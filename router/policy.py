"""Which pair of groups gets a request. Pure: knows what the groups last said about themselves, sends nothing.

Least loaded: prefill by tokens still to be computed, decode by whether the prompt finds room, then by sequences per group.
Ties go to the smaller name, so equal views give equal choices. A decode group that computes the prompt itself (a pair without
prefill: *alone*) is taken while no prefill group at all is open, and for a short prompt when that saves everybody more time than it
costs (see `_gain`): prompts are queueing, and the decode group has few streams to hold up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Names = tuple[str | None, str]

# What a step of a decode group takes beside a chunk of a prompt, in the time of so many of its tokens: reading the weights, and each
# row, which has the vocabulary to go through and a context to read (qwen3-60m: `python -m bench.micro.step`). And what a token takes a
# prefill group, which has its blocks to hand over.
_STEP_COST, _ROW_COST, _PREFILL_COST = 10.0, 1.5, 1.15
# How much less a longer gap between two tokens hurts than a later first one.
_GAP_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class GroupView:
    """What the router knows about a group. name: unique, "prefill-0" or "decode-0/1". ready: in the cluster, and not silent.

    Figures are the group's last word; sent_sequences and sent_tokens are what this router sent there that the figures cannot include
    yet; sent_prompt_tokens: of these, what a decode group has to compute itself. usable_blocks: free or cached, each of block_size
    tokens; 0 blocks of 0 tokens where unknown.
    """

    name: str
    role: Literal["prefill", "decode"]
    ready: bool = True
    draining: bool = False
    waiting_sequences: int = 0
    running_sequences: int = 0
    waiting_tokens: int = 0
    usable_blocks: int = 0
    block_size: int = 0
    sent_sequences: int = 0
    sent_tokens: int = 0
    sent_prompt_tokens: int = 0

    @property
    def open(self) -> bool:
        """Whether new work may be sent."""
        return self.ready and not self.draining

    @property
    def num_sequences(self) -> int:
        """Sequences there or on the way."""
        return self.waiting_sequences + self.running_sequences + self.sent_sequences

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens that it has yet to compute, or that are on the way."""
        return self.waiting_tokens + (self.sent_tokens if self.role == "prefill" else self.sent_prompt_tokens)

    def room_for(self, num_tokens: int) -> bool:
        """Whether `num_tokens` more fit, as far as this router can tell."""
        return num_tokens + self.sent_tokens <= self.usable_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Sharing:
    """When decode groups compute prompts although prefill groups are there.

    max_prompt_tokens: of the longest such prompt; 0: never. step_tokens: of a prompt, in one step beside running sequences, unless
    there are more of these.
    """

    max_prompt_tokens: int = 0
    step_tokens: int = 1


NEVER = Sharing()


def choose(
    groups: Sequence[GroupView],
    proven: Collection[Names],
    prompt_len: int,
    *,
    avoid: Collection[str] = (),
    prefill: str | None = None,
    sharing: Sharing = NEVER,
) -> Names | None:
    """The (prefill, decode) names for a prompt of `prompt_len` tokens, out of the proven pairs; None if no pair is open.

    proven: prefill None where the decode group is alone. groups: also those in no proven pair, for an open prefill group keeps
    others from being alone. avoid: groups that failed this request before, used only if there is nothing else. prefill: only
    decode is still to be chosen, since the blocks are there already; whether that group takes new work does not matter then.
    """
    chosen = _chosen(groups, proven, prompt_len, avoid, prefill)
    if chosen is None or chosen[0] is None or prefill is not None or prompt_len > sharing.max_prompt_tokens:
        return chosen
    views = {view.name: view for view in groups}
    able = [view for view in views.values() if (None, view.name) in proven and view.open and view.name not in avoid]
    best = max(((_gain(views[chosen[0]], view, prompt_len, sharing), view.name) for view in able), default=(0.0, ""))
    return (None, best[1]) if best[0] > 0 else chosen


def _gain(prefill: GroupView, decode: GroupView, prompt_len: int, sharing: Sharing) -> float:
    """What it saves if a decode group computes a prompt in the place of a prefill group: time summed over all who wait, in prompt tokens.

    The request itself is sooner or later by the difference of both delays, and so are those who will come behind it. Every stream of the
    decode group waits for its chunks; of those that are still to come there, half do.
    """
    if not decode.room_for(prompt_len):
        return 0.0
    rows = decode.running_sequences + (decode.waiting_sequences + decode.sent_sequences) / 2
    chunk = max(sharing.step_tokens, rows)
    alone = (decode.pending_tokens + prompt_len) / chunk * (chunk + _STEP_COST + _ROW_COST * rows)
    handed_over = _PREFILL_COST * (prefill.pending_tokens + prompt_len)
    return 2 * (handed_over - alone) - _GAP_WEIGHT * prompt_len * rows


def _chosen(
    groups: Sequence[GroupView], proven: Collection[Names], prompt_len: int, avoid: Collection[str], prefill: str | None
) -> Names | None:
    """The pair of the least cost; decode groups alone only while no prefill group is open."""
    views = {view.name: view for view in groups}
    alone = not any(view.open for view in groups if view.role == "prefill")

    def fits(source: str | None, target: str) -> bool:
        if target not in views or not views[target].open:
            return False
        if prefill is not None:
            return source == prefill and source in views
        return alone if source is None else source in views and views[source].open

    def cost(pair: Names) -> tuple[object, ...]:
        return _cost(views[pair[0]] if pair[0] is not None else None, views[pair[1]], prompt_len, avoid)

    return min((pair for pair in proven if fits(*pair)), key=cost, default=None)


def _cost(prefill: GroupView | None, decode: GroupView, prompt_len: int, avoid: Collection[str]) -> tuple[object, ...]:
    failed = (prefill is not None and prefill.name in avoid) + (decode.name in avoid)
    room = decode.room_for(prompt_len)
    return (failed, not room, *(_prefill_cost(prefill) if prefill else _alone_cost(decode)), *_decode_cost(decode))


def _prefill_cost(view: GroupView) -> tuple[int, int, str]:
    return (view.waiting_tokens + view.sent_tokens, view.num_sequences, view.name)


def _alone_cost(view: GroupView) -> tuple[int, int, str]:
    """Prompts are computed there too, so what waits for that counts before the number of sequences."""
    return (view.waiting_tokens + view.sent_tokens, 0, "")


def _decode_cost(view: GroupView) -> tuple[int, int, str]:
    return (view.num_sequences, -view.usable_blocks, view.name)
