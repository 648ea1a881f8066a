"""`baton up`, `status` and `down`: clusters that live on an existing Ray cluster and outlive the command that started them.

Everything about them is found through Ray: each is a namespace with named detached actors and placement groups.
Knows: Ray's names. Does not know: how a cluster is launched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.config import BatonConfig
from baton.errors import ConfigError, NotFound
from cluster.local import connect, connect_environment
from cluster.machine import check_before_connecting
from cluster.plan import FRONT
from cluster.serve import first_signal_interrupts, ready_line, warn_unapplied

_NAMESPACE = "baton-"


def up(config: BatonConfig, name: str, *, show_logs: bool = False) -> int:
    """Launch a detached cluster; prints one line with its addresses.

    Raises ConfigError for what cannot work, before Ray is asked, and if `name` is taken, else as Cluster.up does.
    """
    config = check_before_connecting(config)
    with first_signal_interrupts(), _connected(config.ray.address, name, show_logs=show_logs):
        if _actor_names(name) or _groups():
            raise ConfigError(
                f"a cluster named {name!r} is already up; take it down with `baton down --name {name}`, or choose another name"
            )
        warn_unapplied(config, Console(stderr=True))
        print(ready_line(asyncio.run(_launch(config))), flush=True)
    return 0


def status(address: str | None, name: str) -> int:
    """Print groups, pairs and what every rank holds. Raises NotFound if there is no such cluster."""
    with _connected(address, name):
        names = _existing(name)
        router = asyncio.run(_ask_router()) if FRONT in names else {"summary": _without_router(name)}
        print_report(router, asyncio.run(_ask_ranks(names)))
    return 0


def down(address: str | None, name: str) -> int:
    """Stop every actor of a cluster and give its slots back. Raises NotFound if there is no such cluster."""
    with _connected(address, name):
        names = _existing(name)
        asyncio.run(_end(names))
        print(f"{name} is down: {len(names)} processes ended")
    return 0


def _without_router(name: str) -> str:
    return f"the router of {name!r} is gone, so nothing is served; these ranks still run. Take them down: baton down --name {name}"


def print_report(router: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """The router's view and the ranks', as tables."""
    console = Console()
    console.print(router.get("summary", ""), highlight=False, markup=False)
    table = Table("rank", "pid", "free + cached + held + quarantined", "leases", "pulls", "steps", box=None, pad_edge=False)
    for rank in ranks:
        blocks = f"{rank['free']} + {rank['cached']} + {rank['held']} + {rank['quarantined']} = {rank['total']}"
        counted = [blocks if rank["leader"] else "as its leader says", *(str(rank[key]) for key in ("open_leases", "open_pulls", "steps"))]
        table.add_row(f"{rank['node']}/{rank['rank']}", str(rank["pid"]), *counted)
    console.print(table)


@contextlib.contextmanager
def _connected(address: str | None, name: str, *, show_logs: bool = False) -> Iterator[None]:
    # This process is ours and short-lived, so its environment may say how to talk to Ray; Ray reads it when it is imported.
    os.environ.update(connect_environment(dict(os.environ)))
    connect(address or _address_from(os.environ), namespace=_NAMESPACE + name, show_logs=show_logs)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def _address_from(environment: Mapping[str, str]) -> str:
    """RAY_ADDRESS. Ray's own "auto" is not asked: it would also adopt the private Ray of a `baton serve` on this host, and hang."""
    address = environment.get("RAY_ADDRESS", "")
    if not address:
        raise ConfigError(
            "no Ray cluster is named: give --ray-address HOST:PORT or set RAY_ADDRESS; "
            "a cluster of `baton serve` is asked by `baton status --address HOST:PORT` (its gRPC address)"
        )
    return address


async def _launch(config: BatonConfig) -> Any:
    from cluster.display import LaunchDisplay
    from cluster.launch import launch

    with LaunchDisplay(Console(stderr=True)) as display:
        cluster = await launch(config, display, detached=True)
    return cluster.info()


def _named_actors() -> list[dict[str, str]]:
    import ray

    listed: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return listed


def _actor_names(name: str) -> list[str]:
    """Live named actors of one cluster."""
    return sorted(actor["name"] for actor in _named_actors() if actor["namespace"] == _NAMESPACE + name)


def _groups() -> list[Any]:
    """Placement groups of the connected cluster: also those whose actors never came to be."""
    from ray.util.placement_group import get_placement_group, placement_group_table

    found = []
    for entry in placement_group_table().values():
        if entry["state"] != "REMOVED" and entry["name"]:
            with contextlib.suppress(ValueError):  # another cluster's: names are looked up within the namespace
                found.append(get_placement_group(entry["name"]))
    return found


def _existing(name: str) -> list[str]:
    names = _actor_names(name)
    if names or _groups():
        return names
    namespaces = {actor["namespace"] for actor in _named_actors() if actor["namespace"].startswith(_NAMESPACE)}
    known = ", ".join(sorted(namespace.removeprefix(_NAMESPACE) for namespace in namespaces))
    raise NotFound(f"no cluster named {name!r} is up on this Ray cluster" + (f"; there are: {known}" if known else ""))


async def _ask_router() -> dict[str, Any]:
    from cluster.calls import result

    answer: dict[str, Any] = await result(FRONT, "report", _actor(FRONT).status.remote())
    return answer


async def _ask_ranks(names: list[str]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from cluster.calls import first_failure, result

    counts = await first_failure([result(name, "count", _actor(name).counts.remote()) for name in names if name != FRONT])
    return [asdict(item) for item in counts]


async def _end(names: list[str]) -> None:
    from cluster.calls import end_actor
    from cluster.placement import release_all

    for first in (True, False):  # the router first: it ends the requests
        await asyncio.gather(*(end_actor(_actor(name)) for name in names if (name == FRONT) is first))
    release_all(_groups())


def _actor(name: str) -> Any:
    import ray

    return ray.get_actor(name)
