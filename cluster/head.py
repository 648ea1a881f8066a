"""A private Ray of the processes that actors need, and no others: gcs_server, raylet and its two agents.

`ray.init` would also start, one after the other, a dashboard (if only a rump of it), an autoscaler and a reader of logs: 1.7 of the
5.2 CPU seconds it takes until actors run (measured on 2.60), and most of the time it takes to end.
Knows Ray's inside, and is the only one to do so: `Node` and `RayParams` are what `ray start` and `ray.init` are made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster import worker_start


class Head(Node):
    """Its processes run once it is made, and end with `end`; or with the thread that made it (Linux)."""

    def __init__(self, home: Path, *, slots: dict[str, float], num_workers: int, store: tuple[str, int], logs: bool) -> None:
        """home: for files. num_workers: in stock. store: directory and bytes of the object store. logs: pass on what workers print."""
        params = RayParams(
            node_ip_address="127.0.0.1",
            num_cpus=num_workers,
            resources=slots,
            include_dashboard=False,
            include_log_monitor=logs,  # type: ignore[arg-type]  # it is a flag
            no_monitor=True,
            plasma_directory=store[0],
            object_store_memory=store[1],
            setup_worker_path=worker_start.__file__,
            temp_dir=str(home),
        )
        super().__init__(params, head=True, shutdown_at_exit=False, spawn_reaper=True)

    def start_api_server(self, **options: Any) -> None:
        """Nobody looks at it."""

    def end(self) -> None:
        """Have everything end, and wait for it."""
        self.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
