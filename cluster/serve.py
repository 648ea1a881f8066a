"""`baton serve`: one cluster on this machine, from start to Ctrl-C or SIGTERM.

Knows: signals and what people want to read. Does not know: how a cluster is made. What is only for people's eyes is imported when it
is needed, because then the cluster's own processes are starting already.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from baton.config import BatonConfig
from baton.deadline import now_s
from baton.errors import Unavailable
from cluster.kept import KeptCluster
from cluster.messages import ClusterInfo, Lost, News
from cluster.processes import own_age_s

if TYPE_CHECKING:
    from rich.console import Console

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM to a cluster that serves: what runs may finish."""


def serve(config: BatonConfig, *, show_logs: bool = False) -> int:
    """Serve until Ctrl-C (then everything ends at once) or SIGTERM (running requests get router.drain_s seconds); returns 0.

    Prints one line with the addresses when ready, and on standard error what is lost, rebuilt and back. Raises what the launch failed
    with; and, where `membership.rebuild` is false, Unavailable when what is left of the cluster can serve nothing.
    """
    ready = False
    with first_signal_interrupts(gently=lambda: ready), KeptCluster(config, show_logs=show_logs) as cluster:
        from rich.console import Console

        from cluster.display import LaunchDisplay

        console = Console(stderr=True)
        warn_unapplied(config, console)
        try:
            with LaunchDisplay(console) as display:
                info = cluster.start(display)
            console.print(display.time_line(now_s() - own_age_s()), highlight=False)
            describe(config, console)
            print(ready_line(info), flush=True)
            ready = True
            _watch_until_terminated(cluster, config, info, console)
        except KeyboardInterrupt:
            console.print("stopping ...", highlight=False, soft_wrap=True)
    return 0


def warn_unapplied(config: BatonConfig, console: Console) -> None:
    """Say what the checkpoint recommends for sampling and nobody will do: answers may differ from other servers' for it."""
    from baton.tokenizer import unapplied_sampling

    for asked in unapplied_sampling(config.model):
        console.print(
            f"warning: generation_config.json asks for {asked}, which is not applied", highlight=False, markup=False, soft_wrap=True
        )


def describe(config: BatonConfig, console: Console) -> None:
    """Say what is served, if the model lies on this host too."""
    from baton.engine.config_json import load_spec
    from cluster.plan import description

    if (Path(config.model) / "config.json").is_file():
        spec = load_spec(config.model, config.dtype, config.quantization)
        console.print(description(config, spec), highlight=False, markup=False, soft_wrap=True)


def ready_line(info: ClusterInfo) -> str:
    """The one line that says where clients connect."""
    return f"ready: {info.model} on http://{info.http} (OpenAI, SGLang) and grpc://{info.grpc} (baton.v1), {len(info.ranks)} ranks"


@contextlib.contextmanager
def first_signal_interrupts(gently: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once; while what follows is cleaned up, further ones are ignored.

    While `gently()` holds, a first SIGTERM raises Terminated, and it is the next signal that interrupts. For the main thread.
    What stops a cluster has deadlines of its own, so nobody needs a second Ctrl-C.
    """
    terminated = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        if number == signal.SIGTERM and gently() and not terminated:
            terminated = True
            raise Terminated
        for signum in _ENDING:
            signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(signum, interrupt) for signum in _ENDING]
    try:
        yield
    finally:
        for signum, former in zip(_ENDING, before, strict=True):
            signal.signal(signum, former)


def _watch_until_terminated(cluster: KeptCluster, config: BatonConfig, info: ClusterInfo, console: Console) -> None:
    """Say what happens until SIGTERM, then let running requests finish. Any further signal goes through: nobody wants to wait."""
    try:
        _watch(cluster, config, info, console)
    except Terminated:
        console.print(f"finishing what runs, for up to {config.router.drain_s:g} s (a signal ends it at once) ...", highlight=False)
        cluster.wind_down()


def _watch(cluster: KeptCluster, config: BatonConfig, info: ClusterInfo, console: Console) -> None:
    """Say what happens; return never. Raises Unavailable if nothing is rebuilt and what is left can serve nothing."""
    lost: set[str] = set()
    while True:
        news = cluster.wait_news()
        assert news is not None, "without a time limit something must have happened"
        say(news, console)
        if isinstance(news, Lost):
            lost.add(news.name)
        if not config.membership.rebuild and (missing := missing_part(info, lost)):
            raise Unavailable(f"no {missing} is left; the cluster is taken down", stage="cluster", cause="cluster_lost")


def say(news: News, console: Console) -> None:
    """Print one line about what happened to a running cluster, and the last words of a process that was lost."""
    console.print(news.said(), highlight=False, markup=False, soft_wrap=True)
    if isinstance(news, Lost) and news.log:
        console.print(news.log, highlight=False, markup=False, style="dim", soft_wrap=True)


def missing_part(info: ClusterInfo, lost: set[str]) -> str | None:
    """The part without which nothing can be served and of which no complete one is left: a node dies with any of its ranks."""
    if lost & {"router"}:
        return "router"
    for role in ("prefill", "decode"):
        broken = {rank.node for rank in info.ranks if rank.name in lost}
        if not {rank.node for rank in info.ranks if rank.role == role} - broken:
            return f"{role} node"
    return None
