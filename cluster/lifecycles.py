"""Draws docs/lifecycles.md from the tables that the code runs on: `make lifecycles`. A test keeps page and code equal.

Knows: where each table is and who steps it. Does not know: what the states mean; their module says that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from baton.lifecycle import Lifecycle
from cluster.supervision import NODE_LIFE
from decode_node.pull import PULL_LIFE
from decode_node.stages import SEQUENCE_LIFE
from kv_transfer.lease import LEASE_LIFE
from prefill_node.scheduler import PROMPT_LIFE
from router.life import REQUEST_LIFE
from router.membership import GROUP_LIFE

_HEAD = """# Life cycles

Everything in Baton that can be half done has one table that says what may happen to it and what follows. The code steps through
these tables and nothing else changes a state; what a table does not have cannot happen, and raises. This page is drawn from them:
`make lifecycles` writes it, and `tests/cluster/test_lifecycles.py` fails if page and code differ.
"""


@dataclass(frozen=True, slots=True)
class Described:
    """A table, the file it is in, and what to know about it: key (what names one of it), owner, and what ends it for certain."""

    life: Lifecycle[Any, Any]
    file: str
    key: str
    owner: str
    end: str


LIVES = (
    Described(
        REQUEST_LIFE,
        "router/life.py",
        "request id (unique in a router's life) and choice; dispatches by attempt number",
        "`Relay`, one per sequence, on the router's loop",
        "the request's deadline; the router's death ends it with the client's connection",
    ),
    Described(
        GROUP_LIFE,
        "router/membership.py",
        "the address of a group's leader; a proof counts for one incarnation of it",
        "`Registry`, on the router's loop",
        "`remove`, by the supervisor. Nothing else is final: a dead group that says hello is met again and proven again",
    ),
    Described(
        PROMPT_LIFE,
        "prefill_node/scheduler.py",
        "(request id, attempt) and the lease number",
        "`PrefillScheduler`, on the leader's loop",
        "the end of its lease; the deadline, a cancel or the loss of the router's stream, once no step writes and no pull reads its blocks",
    ),
    Described(
        LEASE_LIFE,
        "kv_transfer/lease.py",
        "(prefill incarnation, lease number); links by attempt",
        "`LeaseTable`, on the prefill leader's loop",
        "its own deadline; blocks come back only when no link is open any more (acknowledged, closed or fenced)",
    ),
    Described(
        PULL_LIFE,
        "decode_node/pull.py",
        "(request id, attempt), fenced on the lease by attempt",
        "`Intake`, one task per pull, on the decode leader's loop",
        "the request's deadline and the deadline of each read; its blocks stay quarantined until every read has ended",
    ),
    Described(
        SEQUENCE_LIFE,
        "decode_node/stages.py",
        "(request id, attempt)",
        "`DecodeScheduler`, on the decode leader's loop",
        "its last token, the deadline, a cancel, the loss of the router's stream or suspension",
    ),
    Described(
        NODE_LIFE,
        "cluster/supervision.py",
        "the node's name; each life has new incarnations, processes and addresses",
        "the supervisor (the keeper of `baton serve`, the supervisor actor of `baton up`)",
        "`baton down` or `baton drain`; a node that keeps failing is tried again after a growing pause, never given up",
    ),
)


def page() -> str:
    """The whole of docs/lifecycles.md."""
    return "\n".join([_HEAD, *(_section(described) for described in LIVES)])


def _section(described: Described) -> str:
    life = described.life
    facts = [
        f"Table: `{described.file}` · named by: {described.key} · stepped by: {described.owner}.",
        f"Ends at the latest by: {described.end}.",
    ]
    return "\n".join([f"## {life.name.capitalize()}", "", *facts, "", "```mermaid", life.drawing(), "```", "", _table(life), ""])


def _table(life: Lifecycle[Any, Any]) -> str:
    rows = [f"| {before.value} | {event.value} | {after.value} |" for (before, event), after in life.table.items()]
    return "\n".join(["| in | on | goes to |", "|---|---|---|", *rows])


if __name__ == "__main__":
    sys.stdout.write(page())
