"""CPU seconds that a running Baton has used so far, by part. Knows its processes from what the router says of them, and psutil."""

from __future__ import annotations

import psutil

from baton.client import connect
from bench.suite.rows import PARTS
from bench.suite.servers import Server

_ROUTER = "ray::Front"


def cpu_seconds(server: Server) -> dict[str, float]:
    """By part, `rest` being Ray and what keeps the cluster. Ended processes have no part."""
    with connect(f"127.0.0.1:{server.command.grpc_port}") as client:
        roles = {rank.pid: group.role for group in client.status().groups for rank in group.ranks}
    spent = dict.fromkeys(PARTS, 0.0)
    for process in server.processes():
        try:
            times, words = process.cpu_times(), process.cmdline()
        except psutil.NoSuchProcess:
            continue
        usual = "router" if words and words[0].startswith(_ROUTER) else "rest"
        spent[roles.get(process.pid, usual)] += times.user + times.system
    return spent
