"""A host that dies takes its ranks along; their node waits until another host has room for it, says so, and is built there.

The hosts are Ray's own fake ones, in a process of their own: raylets with what belongs to them, all on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.local import import_environment
from cluster.messages import Back, Lost, News, Rebuilding, Waiting
from cluster.offline import Engine

pytestmark = [pytest.mark.relay, pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 120.0
LABELS = {"ray.prefill_label": {"role": "prefill"}, "ray.decode_label": {"role": "decode"}}
SETTINGS = {"kv_memory": "8MiB", "max_model_len": 256, "dtype": "float32", "decode.tp": 2, **LABELS}
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
# Says its address, then obeys: "kill" a host's raylet, "add" another host.
PROGRAM = """if True:
    import sys
    from ray.cluster_utils import Cluster
    memory = 80 * 2**20
    head = dict(num_cpus=1, resources={"baton_rank": 1}, labels={"role": "prefill"}, object_store_memory=memory)
    cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    def add():
        return cluster.add_node(num_cpus=1, resources={"baton_rank": 2}, labels={"role": "decode"}, object_store_memory=memory)
    host = add()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line == "kill\\n":
            host.all_processes["raylet"][0].process.kill()
        else:
            add()
        print("done", flush=True)
    cluster.shutdown()
"""


@dataclass(frozen=True)
class Hosts:
    process: subprocess.Popen[str]

    def say(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hosts, str]]:
    mode = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in mode.items():
        monkeypatch.setenv(name, value)
    environ = {**os.environ, **import_environment(dict(os.environ))}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Hosts(process), process.stdout.readline().strip()
        process.communicate(timeout=60)


def until(engine: Engine, kind: type[News]) -> list[News]:
    heard: list[News] = []
    while (news := engine.wait_news(WAIT_S)) is not None:
        heard.append(news)
        if isinstance(news, kind):
            return heard
    raise AssertionError(f"never heard {kind.__name__}: {heard}")


def test_a_node_whose_host_dies_is_built_on_another(hosts: tuple[Hosts, str], tiny_model: Path) -> None:
    them, address = hosts
    with Engine(str(tiny_model), {**SETTINGS, "ray.address": address}) as engine:
        (expected,) = engine.generate("x", GREEDY)
        before = [rank.pid for rank in engine.processes().ranks if rank.node == "decode-0"]
        psutil.Process(before[1]).suspend()  # nobody on that host could ask this one to end any more
        assert them.say("kill") == "done"
        heard = until(engine, Waiting)
        assert isinstance(heard[0], Lost) and any(isinstance(news, Rebuilding) for news in heard), heard
        assert "decode-0 needs 2 baton_rank on one host with labels role=decode" in heard[-1].said()
        assert not [pid for pid in before if psutil.pid_exists(pid)]
        assert [rank.node for rank in engine.processes().ranks] == ["prefill-0"]
        assert them.say("add") == "done"
        until(engine, Back)
        assert engine.generate("x", GREEDY)[0].token_ids == expected.token_ids
        assert len(engine.counts()) == 3
