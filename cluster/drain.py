"""`baton drain` and `baton restore`: a node of a running cluster out of service and back, over gRPC.

Knows: the client and what operators want to read. Does not know: Ray, or who ends and builds processes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from baton.client import SyncClient
from baton.deadline import Deadline
from cluster.talk import connected

RETIRE_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Standing:
    """How one node is, as the router says it. stage, why, lives: its supervisor's words, "" and 0 if nobody supervises it.

    groups: the state of each, by number; empty if the router knows none. proven: whether requests can go through it.
    """

    stage: str
    why: str
    lives: int
    groups: dict[int, str]
    num_processes: int
    num_sequences: int
    proven: bool

    @property
    def serves(self) -> bool:
        """Whether all of it takes requests."""
        return self.stage in ("serving", "") and set(self.groups.values()) == {"ready"} and self.proven

    def said(self) -> str:
        """For people."""
        groups = ", ".join(f"group {number} is {state}" for number, state in self.groups.items())
        stage = f"{self.stage} ({self.why})" if self.why else self.stage
        return f"{stage or 'nobody supervises it'}; {groups or 'the router knows none of its groups'}"


def standing(client: SyncClient, node: str) -> Standing:
    """Ask the router about a node."""
    status = client.status()
    report = next((report for report in status.nodes if report.node == node), None)
    groups = [group for group in status.groups if group.node == node]
    return Standing(
        stage=report.stage if report else "",
        why=report.why if report else "",
        lives=report.lives if report else 0,
        groups={group.group: group.state for group in groups},
        num_processes=len({(rank.host, rank.pid) for group in groups for rank in group.ranks}),
        num_sequences=sum(group.load.running_sequences + group.load.waiting_sequences for group in groups),
        proven=any(pair.proven and node in (pair.prefill, pair.decode.partition("/")[0]) for pair in status.pairs),
    )


def drain(address: str, api_key: str | None, node: str, timeout_s: float, *, keep: bool) -> int:
    """Have a node finish its work or hand it over; then (unless keep) wait until its processes have ended.

    Returns 0, or 1 if work is still there after that, or processes are. Raises NotFound, naming the nodes that are known.
    """
    began_s = time.monotonic()
    with connected(address, api_key) as client:
        num_processes = standing(client, node).num_processes
        drained = client.drain(node, timeout_s, retire=not keep)
        elsewhere = f"{drained.handed_over} sequences went on elsewhere"
        if not drained.idle:
            left = standing(client, node).num_sequences
            print(f"{node} takes no new work, and {left} sequences are still there after {_since(began_s)}; {elsewhere}; it stays as it is")
            return 1
        print(f"{node} is idle after {_since(began_s)}; {elsewhere}")
        if keep:
            print(f"its {num_processes} processes stay; `baton restore {node}` gives it work again")
            return 0
        return _until_retired(client, node, num_processes)


def restore(address: str, api_key: str | None, node: str, timeout_s: float) -> int:
    """Take a drained node back, and wait until a proven pair can use it; 0, or 1 with how things stand if that takes longer.

    Raises NotFound, naming the nodes that are known.
    """
    began_s, deadline = time.monotonic(), Deadline.after(timeout_s)
    with connected(address, api_key) as client:
        client.restore(node)
        while not (now := standing(client, node)).serves:
            if deadline.passed():
                print(f"{node} does not serve after {_since(began_s)}: {now.said()}", file=sys.stderr)
                return 1
            time.sleep(_POLL_S)
    life = f" (life {now.lives})" if now.lives else ""
    print(f"{node} serves again after {_since(began_s)} with {now.num_processes} processes{life}")
    return 0


def _until_retired(client: SyncClient, node: str, num_processes: int) -> int:
    deadline = Deadline.after(RETIRE_S)
    while (now := standing(client, node)).stage != "retired":
        if deadline.passed():
            print(f"its processes have not ended after {RETIRE_S:g} s: {now.said()}", file=sys.stderr)
            return 1
        time.sleep(_POLL_S)
    print(f"its {num_processes} processes have ended and its slots are given back; `baton restore {node}` builds it again")
    return 0


def _since(began_s: float) -> str:
    return f"{time.monotonic() - began_s:.1f} s"
