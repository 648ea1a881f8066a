"""Threads that compute run where they are told, and no others do."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from baton.engine.devices.cpu_threads import bind_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cores are bound on Linux only")


def affinities() -> dict[int, set[int]]:
    """Where each thread of this process may run."""
    return {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}


def test_each_thread_of_an_operation_gets_a_core_of_its_own() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core")
    before, found = set(affinities()), {}

    def compute() -> None:
        torch.set_num_threads(2)
        torch.ones(1 << 20).add(1)
        for cores in ((0, 1), (1, 0), (1,)):
            bind_threads(cores)
            others = {
                thread: where for thread, where in affinities().items() if thread not in before and thread != threading.get_native_id()
            }
            found[cores] = os.sched_getaffinity(0), [where for where in others.values() if len(where) == 1]

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found[0, 1] == ({allowed[0]}, [{allowed[1]}])
    assert found[1, 0] == ({allowed[1]}, [{allowed[0]}])
    assert found[1,][0] == {allowed[1]}
    assert os.sched_getaffinity(0) == set(allowed)
    assert all(where == set(allowed) for thread, where in affinities().items() if thread in before)


def test_who_is_promised_more_cores_than_there_are_gets_those_that_are() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    found: list[set[int]] = []

    def compute() -> None:
        torch.set_num_threads(1)
        bind_threads((len(allowed),))
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found == [{allowed[0]}]
