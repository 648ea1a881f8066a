"""`baton serve`: one cluster on this machine, from start to Ctrl-C.

Knows: signals and what people want to read. Does not know: how a cluster is made.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from baton.config import BatonConfig
from baton.engine.config_json import load_spec
from baton.errors import Unavailable
from baton.tokenizer import unapplied_sampling
from cluster.display import LaunchDisplay
from cluster.kept import KeptCluster
from cluster.messages import ClusterInfo, Lost
from cluster.plan import description

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(config: BatonConfig, *, show_logs: bool = False) -> int:
    """Serve until Ctrl-C or SIGTERM, then take everything down; returns 0. Prints one line with the addresses when ready.

    Raises what the launch failed with, and Unavailable when what is left of the cluster can serve nothing.
    """
    console = Console(stderr=True)
    with first_signal_interrupts(), KeptCluster(config, show_logs=show_logs) as cluster:
        warn_unapplied(config, console)
        try:
            with LaunchDisplay(console) as display:
                info = cluster.start(display)
            describe(config, console)
            print(ready_line(info), flush=True)
            _watch(cluster, info, console)
        except KeyboardInterrupt:
            console.print("stopping ...", highlight=False, soft_wrap=True)
    return 0


def warn_unapplied(config: BatonConfig, console: Console) -> None:
    """Say what the checkpoint recommends for sampling and nobody will do: answers may differ from other servers' for it."""
    for asked in unapplied_sampling(config.model):
        console.print(
            f"warning: generation_config.json asks for {asked}, which is not applied", highlight=False, markup=False, soft_wrap=True
        )


def describe(config: BatonConfig, console: Console) -> None:
    """Say what is served, if the model lies on this host too."""
    if (Path(config.model) / "config.json").is_file():
        spec = load_spec(config.model, config.dtype, config.quantization)
        console.print(description(config, spec), highlight=False, markup=False, soft_wrap=True)


def ready_line(info: ClusterInfo) -> str:
    """The one line that says where clients connect."""
    return f"ready: {info.model} on http://{info.http} (OpenAI, SGLang) and grpc://{info.grpc} (baton.v1), {len(info.ranks)} ranks"


@contextlib.contextmanager
def first_signal_interrupts() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once; while what follows is cleaned up, further ones are ignored.

    For the main thread. What stops a cluster has deadlines of its own, so nobody needs a second Ctrl-C.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for signum in _ENDING:
            signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(signum, interrupt) for signum in _ENDING]
    try:
        yield
    finally:
        for signum, former in zip(_ENDING, before, strict=True):
            signal.signal(signum, former)


def _watch(cluster: KeptCluster, info: ClusterInfo, console: Console) -> None:
    """Report every death; return never, raise when nothing can be served any more."""
    lost: list[Lost] = []
    while True:
        event = cluster.wait_lost()
        assert event is not None, "without a time limit something must have happened"
        lost.append(event)
        console.print(f"lost: {event.name} (pid {event.pid}) ended: {event.reason}", highlight=False, soft_wrap=True)
        if event.log:
            console.print(event.log, highlight=False, markup=False, style="dim", soft_wrap=True)
        if missing := missing_part(info, {item.name for item in lost}):
            raise Unavailable(f"no {missing} is left; the cluster is taken down", stage="cluster", cause="cluster_lost")


def missing_part(info: ClusterInfo, lost: set[str]) -> str | None:
    """The part without which nothing can be served and of which no complete one is left: a node dies with any of its ranks."""
    if lost & {"router"}:
        return "router"
    for role in ("prefill", "decode"):
        broken = {rank.node for rank in info.ranks if rank.name in lost}
        if not {rank.node for rank in info.ranks if rank.role == role} - broken:
            return f"{role} node"
    return None
