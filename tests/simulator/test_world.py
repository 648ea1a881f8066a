"""Whole worlds: every promise is kept under every schedule, equal seeds are equal worlds, and planted bugs are found.

If a seed fails here, `python -m simulator --seed N --trace` tells its whole story.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.planted import PLANTED
from simulator.run import Summary, main
from simulator.world import Simulator

ROOT = Path(__file__).resolve().parents[2]
NUM_SEEDS = 300
PART = 50
EASY = ("no-index", "released-on-a-timer", "no-quarantine", "suspended-is-final", "quarantined-for-ever")
MOST_SEEDS = 1000


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, PART))
def test_every_promise_is_kept(first):
    with Simulator() as simulator:
        broken = {seed: report.error for seed in range(first, first + PART) if (report := simulator.run(seed)).error}
    assert not broken


def test_the_schedules_do_what_they_are_for():
    counts: dict[str, int] = {}
    with Simulator() as simulator:
        for seed in range(1000, 1060):
            for what, count in simulator.run(seed).counts.items():
                counts[what] = counts.get(what, 0) + count
    for what in ("outcome finished", "retries node_lost", "rebuilt", "condemned", "prompts alone", "blocks read", "outcome deadline"):
        assert counts.get(what), f"no {what} in 60 schedules"


PROGRAM = """if True:
    from simulator.world import Simulator
    with Simulator() as simulator:
        for seed in {seeds}:
            report = simulator.run(seed)
            print(seed, report.digest, report.num_events, sorted(report.counts.items()), report.error)
"""


def telling(seeds: list[int], hash_seed: str) -> subprocess.Popen[str]:
    """Another process that says what comes of these seeds."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", PROGRAM.format(seeds=seeds)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_equal_seeds_are_equal_worlds():
    """In two processes, whose sets of strings have other orders, and whatever was run before."""
    seeds = list(range(40))
    with telling(seeds, "1") as one, telling(seeds[::-1], "2") as other:
        first, second = (process.communicate(timeout=100)[0].splitlines() for process in (one, other))
    assert len(first) == len(seeds)
    assert first == second[::-1]


def caught(name: str) -> str:
    with PLANTED[name]() as leader, Simulator(make_leader=leader) as simulator:
        return next((report.error for seed in range(MOST_SEEDS) if (report := simulator.run(seed)).error), "")


@pytest.mark.parametrize("name", EASY)
def test_a_planted_bug_is_caught(name):
    assert caught(name)


def test_nothing_planted_stays():
    with PLANTED["no-index"](), Simulator() as simulator:
        assert simulator.run(0).error
    with Simulator() as simulator:
        assert not simulator.run(0).error


@pytest.mark.relay
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(set(PLANTED) - set(EASY)))
def test_a_rare_planted_bug_is_caught_within_a_thousand_schedules(name):
    assert caught(name)


@pytest.mark.relay
@pytest.mark.timeout(900)
def test_thousands_of_schedules():
    command = [sys.executable, "-m", "simulator", "--seeds", "3000", "--first", "10000", "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_failing_seed_says_how_to_replay_it(capfd):
    assert main(["--seeds", "2", "--jobs", "1", "--planted", "no-index"]) == 1
    out = capfd.readouterr().out
    assert "python -m simulator --seed 0 --planted no-index --trace" in out


def test_a_replay_tells_everything(capfd):
    assert main(["--seed", "3", "--trace"]) == 0
    out = capfd.readouterr().out
    assert "Generate: request_id" in out
    assert "every promise was kept" in out


def test_a_summary_adds_up():
    summary = Summary()
    told = {"seed": 5, "season": "calm", "error": "", "digest": 1, "virtual_s": 2.5, "num_events": 10, "cpu_s": 1}
    line = json.dumps({**told, "counts": {"a": 2}, "faults": {}})
    summary.add(line)
    summary.add(line.replace('"error": ""', '"error": "x"'))
    assert (summary.num_schedules, summary.virtual_s, summary.counts["a"], summary.broken) == (2, 5.0, 4, {5: "x"})
