"""The registry as operators see it, in JSON: for /health?verbose, `baton status` and tests. Only reads."""

from __future__ import annotations

from dataclasses import asdict

from router.group import Group, Pair
from router.registry import Registry


def status_of(registry: Registry) -> dict[str, object]:
    """All groups, pairs and supervised nodes: {"groups": [...], "pairs": [...], "nodes": [...], "summary": text}."""
    return {
        "groups": [_group(group) for group in registry.groups()],
        "pairs": [_pair(pair) for pair in registry.pairs()],
        "nodes": [asdict(report) for report in registry.reports.values()],
        "summary": registry.summary(),
    }


def _group(group: Group) -> dict[str, object]:
    return {
        "name": group.name,
        "node": group.node,
        "group": group.number,
        "role": group.role.value,
        "state": group.state.value,
        "refusal": group.refusal,
        "why": group.trouble,
        "address": group.address,
        "incarnation": group.incarnation.hex(),
        "ranks": [asdict(rank) for rank in group.hello.ranks] if group.hello else [],
        "max_model_len": group.hello.max_model_len if group.hello else None,
        "load": asdict(group.load),
        "pulls": asdict(group.pulls),
    }


def _pair(pair: Pair) -> dict[str, object]:
    return {
        "prefill": pair.prefill.name if pair.prefill else "",
        "decode": pair.decode.name,
        "name": pair.name,
        "proven": pair.proven,
        "usable": pair.usable,
        "refusal": pair.refusal,
        "last_error": pair.last_error,
    }
