"""The life of whatever a supervisor keeps alive (a node, the router), and how long it waits before it builds one again. Pure.

Knows no Ray, no clock and no processes; cluster/care.py steps the lives and does what each state asks for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.lifecycle import Lifecycle

# A life that served this long counts as a good one: what ends it is built again at once.
STEADY_S = 10.0
FIRST_PAUSE_S = 1.0
_MAX_DOUBLINGS = 30


class NodeState(enum.StrEnum):
    """What is being done about a node.

    placing: finding a host with its slots; starting: its processes, up to their ports; loading: up to its leaders serving.
    broken: one of its processes ended or was condemned, and all of the others are being killed; waiting: the pause before another
    try. retiring: its processes are being ended because an operator wants it, retired: they are, and the slots are given back.
    gone: the cluster is down.
    """

    PLACING = "placing"
    STARTING = "starting"
    LOADING = "loading"
    SERVING = "serving"
    BROKEN = "broken"
    WAITING = "waiting"
    RETIRING = "retiring"
    RETIRED = "retired"
    GONE = "gone"


class NodeEvent(enum.StrEnum):
    """What can happen to a node.

    placed, started, ready: a stage of building it is done. broke: a stage failed, a process ended, or the router condemned it.
    ended: none of its processes is left. due: the pause is over. retire, restore: an operator's wish. down: the cluster's end.
    """

    PLACED = "placed"
    STARTED = "started"
    READY = "ready"
    BROKE = "broke"
    ENDED = "ended"
    DUE = "due"
    RETIRE = "retire"
    RESTORE = "restore"
    DOWN = "down"


_S, _E = NodeState, NodeEvent
BUILDING = (_S.PLACING, _S.STARTING, _S.LOADING)

# A wish that comes while processes are being killed waits until they are: half a life is never left behind.
NODE_LIFE: Lifecycle[NodeState, NodeEvent] = Lifecycle(
    "node",
    _S.PLACING,
    {
        (_S.PLACING, _E.PLACED): _S.STARTING,
        (_S.STARTING, _E.STARTED): _S.LOADING,
        (_S.LOADING, _E.READY): _S.SERVING,
        **{(state, _E.BROKE): _S.BROKEN for state in (*BUILDING, _S.SERVING)},
        (_S.BROKEN, _E.ENDED): _S.WAITING,
        (_S.WAITING, _E.DUE): _S.PLACING,
        **{(state, _E.RETIRE): _S.RETIRING for state in (*BUILDING, _S.SERVING, _S.WAITING)},
        (_S.RETIRING, _E.ENDED): _S.RETIRED,
        (_S.RETIRED, _E.RESTORE): _S.PLACING,
        **{(state, _E.DOWN): _S.GONE for state in _S if state is not _S.GONE},
    },
)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often in a row a node broke without having served for a while. Never an end: there is always a next try."""

    breaks: int = 0

    def broke(self, served_s: float) -> Backoff:
        """After another break of a life that served for served_s seconds (0: it never did)."""
        return Backoff(1 if served_s >= STEADY_S else self.breaks + 1)

    def pause_s(self, max_s: float) -> float:
        """Seconds until the next try: none after a first break, then doubling from FIRST_PAUSE_S up to max_s."""
        if self.breaks <= 1:
            return 0.0
        return float(min(max_s, FIRST_PAUSE_S * 2 ** min(self.breaks - 2, _MAX_DOUBLINGS)))
