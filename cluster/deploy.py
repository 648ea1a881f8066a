"""`baton up`, `status` and `down`: clusters that live on an existing Ray cluster and outlive the command that started them.

Everything about them is found through Ray: each is a namespace with named detached actors and placement groups; one of the actors is
the supervisor, which launches the others and builds again what breaks. Knows: what people are told. Does not know: how it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from baton.config import BatonConfig
from baton.deadline import Deadline
from baton.errors import ConfigError, NodeLost, NotFound
from cluster.display import LaunchDisplay
from cluster.local import connect, connect_environment
from cluster.machine import check_before_connecting
from cluster.messages import EVENT, ClusterInfo, Failed, Progress, Ready, Stage
from cluster.plan import FRONT, SUPERVISOR
from cluster.serve import first_signal_interrupts, ready_line, warn_unapplied

if TYPE_CHECKING:
    from cluster.supervisor import Kept
    from ranks.facts import RankCounts

_NAMESPACE = "baton-"
_POLL_S = 5.0
_ANSWER_S = 5.0
_RETRY_S = 0.5


def up(config: BatonConfig, name: str, *, show_logs: bool = False) -> int:
    """Launch a detached cluster, with a supervisor that keeps it; prints one line with its addresses.

    Raises ConfigError for what cannot work, before Ray is asked, and if `name` is taken, else as Cluster.up does. What ends this
    command before the cluster is up ends the cluster, too.
    """
    config = check_before_connecting(config)
    with first_signal_interrupts(), _connected(config.ray.address, name, show_logs=show_logs):
        from cluster import census

        if census.actor_names(name) or census.groups():
            raise ConfigError(
                f"a cluster named {name!r} is already up; take it down with `baton down --name {name}`, or choose another name"
            )
        warn_unapplied(config, Console(stderr=True))
        print(ready_line(asyncio.run(_launch(config, name))), flush=True)
    return 0


def status(address: str | None, name: str) -> int:
    """Print what router and supervisor say, and what every rank holds. Raises NotFound if there is no such cluster."""
    with _connected(address, name):
        asyncio.run(_report(name))
    return 0


def down(address: str | None, name: str) -> int:
    """Stop every process of a cluster, give its slots back, and prove it: 0, or 1 with a list of what is left.

    Raises NotFound if there is no such cluster.
    """
    with _connected(address, name):
        from cluster.takedown import take_down

        _existing(name)
        done = asyncio.run(take_down(name))
        print(done.said(name))
    return 0 if done.complete else 1


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


async def _launch(config: BatonConfig, name: str) -> ClusterInfo:
    from cluster.takedown import take_down

    with LaunchDisplay(Console(stderr=True)) as display:
        supervisor = _make_supervisor(config)
        try:
            return await _follow(supervisor, display, Deadline.after(2 * config.ray.ready_s))
        except BaseException:  # Ctrl-C included: a cluster that is not up is of no use to anyone
            await take_down(name)
            raise


def _make_supervisor(config: BatonConfig) -> Any:
    """Beside this command, where the addresses in the configuration are meant; Ray starts it again, elsewhere if need be."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.hosts import own_host_id
    from cluster.supervisor import Supervisor

    here = NodeAffinitySchedulingStrategy(own_host_id(), soft=True)
    lasting = {"name": SUPERVISOR, "lifetime": "detached", "max_restarts": -1, "max_task_retries": 0}
    made: Any = ray.remote(Supervisor)
    return made.options(**lasting, num_cpus=0, scheduling_strategy=here).remote(config, own_host_id())


async def _follow(supervisor: Any, display: LaunchDisplay, deadline: Deadline) -> ClusterInfo:
    """Show how the launch goes; what is up in the end. Raises what it failed with. A supervisor that is started again is waited for."""
    from ray.exceptions import ActorUnavailableError, RayActorError

    after = 0
    while not deadline.passed():
        try:
            heard = await supervisor.said.remote(after, _POLL_S)
        except ActorUnavailableError:
            after = 0
            await asyncio.sleep(_RETRY_S)
            continue
        except RayActorError as error:
            raise NodeLost("the cluster was taken down while it was launched", stage="launch", node=SUPERVISOR) from error
        for number, line in heard:
            after = number
            event = EVENT.validate_json(line)
            if isinstance(event, Ready):
                return event.info
            if isinstance(event, Failed):
                raise event.error.error()
            if isinstance(event, Stage | Progress):
                display(event)
    raise NodeLost("the supervisor says nothing", stage="launch", node=SUPERVISOR)


def _existing(name: str) -> list[str]:
    """The live actors of a cluster. NotFound if there is nothing of it."""
    from cluster import census

    names = census.actor_names(name)
    if names or census.groups():
        return names
    known = ", ".join(census.clusters())
    raise NotFound(f"no cluster named {name!r} is up on this Ray cluster" + (f"; there are: {known}" if known else ""))


async def _report(name: str) -> None:
    names = _existing(name)
    kept, router = await asyncio.gather(_ask(SUPERVISOR, lambda actor: actor.describe), _ask(FRONT, lambda actor: actor.status))
    ranks = [rank for rank in names if rank not in (FRONT, SUPERVISOR)]
    counts = await asyncio.gather(*(_ask(rank, lambda actor: actor.counts) for rank in ranks))
    console = Console()
    console.print(
        (router or {}).get("summary", "the router does not answer: nothing is served now"), highlight=False, markup=False, soft_wrap=True
    )
    _print_nodes(console, kept)
    _print_ranks(console, dict(zip(ranks, counts, strict=True)))


async def _ask(name: str, method: Callable[[Any], Any]) -> Any:
    """What an actor answers; None if there is none, or if it is dead or does not answer."""
    from ray.exceptions import RayActorError, RayTaskError

    from cluster import census

    if (actor := census.actor(name)) is None:
        return None
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await method(actor).remote()
    except (RayActorError, RayTaskError, TimeoutError):
        return None


def _print_nodes(console: Console, kept: Kept | None) -> None:
    if kept is None:
        console.print("the supervisor does not answer: nothing is built again before Ray has started it anew", highlight=False)
        return
    console.print(f"kept by the supervisor, pid {kept.process.mark.pid}", highlight=False)
    if kept.failure:
        console.print(f"the supervisor has failed: {kept.failure}", highlight=False, markup=False)
    table = Table("node", "is", "lives", "last lost because", box=None, pad_edge=False)
    for node in kept.nodes:
        table.add_row(node.node, node.stage, str(node.lives), node.why)
    console.print(table, markup=False)


def _print_ranks(console: Console, ranks: Mapping[str, RankCounts | None]) -> None:
    table = Table("rank", "pid", "free + cached + held + quarantined", "leases", "pulls", "steps", box=None, pad_edge=False)
    for name, rank in ranks.items():
        if rank is None:
            table.add_row(name, "", "does not answer")
            continue
        blocks = f"{rank.free} + {rank.cached} + {rank.held} + {rank.quarantined} = {rank.total}"
        counted = [blocks if rank.leader else "as its leader says", str(rank.open_leases), str(rank.open_pulls), str(rank.steps)]
        table.add_row(name, str(rank.pid), *counted)
    console.print(table)
