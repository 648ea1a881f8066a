"""Who counts as a member: a group's life as the router sees it, the judgement of its silence, and what a supervisor says of nodes.

Pure: knows no links and no clock; it is told how long a group has been silent. `router/registry.py` steps the lives.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from baton.lifecycle import Lifecycle

Stage = Literal["placing", "starting", "loading", "serving", "broken", "waiting", "retiring", "retired"]


class GroupState(enum.StrEnum):
    """joining: not heard from yet; ready: takes work; suspect: silent, gets no new work; draining: finishes what it has.

    gone: its stream broke a moment ago; dead: silent or unreachable for too long, and condemned. Dead is half open: it is still
    called, and its hello makes it ready again. refused: it and this router do not understand each other; it is asked again and
    again, since another may come in its place. removed: the end.
    """

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    GONE = "gone"
    DEAD = "dead"
    REFUSED = "refused"
    REMOVED = "removed"


class GroupEvent(enum.StrEnum):
    """What can happen to a group.

    hello: it said who it is, on a new stream; heard: it said anything; silent, expire: it has said nothing for suspect_s, for
    dead_s; broke: its stream did; refuse: it cannot be understood; drain, open: it shall take no new work, it may again.
    """

    HELLO = "hello"
    HEARD = "heard"
    SILENT = "silent"
    EXPIRE = "expire"
    BROKE = "broke"
    REFUSE = "refuse"
    DRAIN = "drain"
    OPEN = "open"
    REMOVE = "remove"


_S, _E = GroupState, GroupEvent
UP = (_S.READY, _S.SUSPECT, _S.DRAINING)  # a stream is open, and hello was said on it
_CALLED = (_S.JOINING, _S.GONE, _S.DEAD, _S.REFUSED)  # there is none, and one is tried for

# A group that is down says hello before anything else, so what comes late from a broken stream finds no row.
GROUP_LIFE: Lifecycle[GroupState, GroupEvent] = Lifecycle(
    "group",
    _S.JOINING,
    {
        **{(state, _E.HELLO): _S.READY for state in (*_CALLED, *UP)},
        (_S.READY, _E.HEARD): _S.READY,
        (_S.SUSPECT, _E.HEARD): _S.READY,
        (_S.DRAINING, _E.HEARD): _S.DRAINING,
        (_S.READY, _E.DRAIN): _S.DRAINING,
        (_S.DRAINING, _E.OPEN): _S.READY,
        (_S.READY, _E.SILENT): _S.SUSPECT,
        (_S.DRAINING, _E.SILENT): _S.SUSPECT,
        **{(state, _E.BROKE): _S.GONE for state in UP},
        **{(state, _E.EXPIRE): _S.DEAD for state in (_S.JOINING, *UP, _S.GONE, _S.REFUSED)},
        **{(state, _E.REFUSE): _S.REFUSED for state in _CALLED},
        **{(state, _E.REMOVE): _S.REMOVED for state in (*_CALLED, *UP)},
    },
)


def judge(now_s: float, heard_s: float, *, suspect_s: float, dead_s: float) -> GroupEvent | None:
    """What a silence since `heard_s` amounts to: SILENT from suspect_s on, EXPIRE from dead_s on, None before. Seconds, one clock."""
    silent_s = now_s - heard_s
    if silent_s >= dead_s:
        return GroupEvent.EXPIRE
    return GroupEvent.SILENT if silent_s >= suspect_s else None


def own_pause(now_s: float, looked_s: float, beat_s: float) -> float:
    """Seconds for which this process itself cannot have run, if it looks once per beat and did so last at `looked_s`.

    Words that came meanwhile lie unread: without this, a router that was stopped would find all of its nodes dead.
    """
    late_s = now_s - looked_s - beat_s
    return late_s if late_s > beat_s else 0.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node as its supervisor sees it, also while none of its groups can be talked to. One per node, the newest; kept for good.

    why: of the last break, "" if there was none. lives: how often the node has been built, this time included.
    """

    node: str
    role: Literal["prefill", "decode"]
    stage: Stage
    why: str = ""
    lives: int = 1

    @property
    def coming(self) -> bool:
        """Whether the node is on its way (back) into service."""
        return self.stage not in ("serving", "retiring", "retired")

    @property
    def said(self) -> str:
        """ "decode-1 is being rebuilt: loading (rank 0 died)", for people; "" while the node serves."""
        if self.stage == "serving":
            return ""
        built = "is being rebuilt" if self.lives > 1 or self.why else "is being built"
        words = {"broken": "is broken", "waiting": "waits to be rebuilt", "retiring": "is being taken down", "retired": "is retired"}.get(
            self.stage, f"{built}: {self.stage}"
        )
        return f"{self.node} {words}" + (f" ({self.why})" if self.why else "")
