"""The program that holds two raylets on one machine: `python -m bench.chaos.hosts HOME SLOTS SLOTS`, started by raylets.py.

It ends, and takes both along, when its standard input closes. Every line it reads starts the second raylet anew. Knows Ray; nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO

import ray
from ray._private.node import Node  # what ray.cluster_utils makes its nodes of; that writes to a place that all users share
from ray._private.parameter import RayParams

from bench.chaos.raylets import Hosts
from cluster.local import OBJECT_STORE_BYTES, private_ray
from cluster.plan import RANK_RESOURCE


def main() -> int:
    """Hold both until the other end hangs up."""
    home, first, second = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Ray prints what it thinks of a lost raylet
    with private_ray(home, first):
        _hold(home, second, out)
    return 0


def _hold(home: Path, second: int, out: TextIO) -> None:
    context = ray.get_runtime_context()
    label = {"ray.io/node-id": str(context.get_node_id())}
    while True:
        node = _start(home, context.gcs_address, second)
        hosts = Hosts(address=context.gcs_address, first=label, second_pid=node.all_processes["raylet"][0].process.pid)
        print(hosts.model_dump_json(), file=out, flush=True)
        again = sys.stdin.readline()
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        if not again:
            return


def _start(home: Path, address: str, slots: int) -> Any:
    """A raylet beside the first one, as ray.cluster_utils starts it: ports are any free ones, logs go where the first one's go."""
    parameters = RayParams(
        gcs_address=address,
        node_ip_address="127.0.0.1",
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
        num_cpus=slots,
        num_gpus=0,
        resources={RANK_RESOURCE: slots},
        object_store_memory=OBJECT_STORE_BYTES,
        plasma_directory=str(home),
        temp_dir=str(home),
        include_log_monitor=False,  # type: ignore[arg-type]
        dashboard_agent_listen_port=None,
    )
    return Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)


if __name__ == "__main__":
    sys.exit(main())
