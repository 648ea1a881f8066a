"""Pages are there before they are needed, and what lies in them stays as it was."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from baton.errors import LeaseLost
from kv_transfer.memory import MemoryReads
from kv_transfer.pool import Pool, map_readonly
from kv_transfer.resident import STEP_BYTES, ahead
from kv_transfer.thread import TransferThread

Make = Callable[..., Pool]


def resident_bytes(address: int) -> int:
    """Of the mapping that holds this address."""
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    inside = False
    for line in lines:
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return 1024 * int(line.split()[1])
    raise AssertionError("nothing is mapped there")


@pytest.mark.parametrize("shared", [True, False])
def test_all_of_a_pool_is_resident_in_steps_and_unchanged(pool: Make, shared: bool) -> None:
    made = Pool(3, STEP_BYTES, shared=shared)
    address = np.frombuffer(made.data, np.uint8).__array_interface__["data"][0]
    made.data[5] = 77
    before = resident_bytes(address)
    assert sum(1 for _ in ahead(made.data, write=True)) in (0, 3, 4)  # 0: a kernel that cannot; 4: the data starts within a page
    assert resident_bytes(address) in (before, *range(3 * STEP_BYTES, 5 * STEP_BYTES, mmap.PAGESIZE))
    assert made.data[5] == 77 and not any(made.data[6:4096])
    made.close()


def test_a_readers_mapping_too_without_a_word_written(pool: Make) -> None:
    made = pool(num_blocks=4, block_bytes=STEP_BYTES)
    view = map_readonly(made.readonly_fd())
    before = bytes(made.data)
    for _ in ahead(view.data, write=False):
        continue
    assert bytes(view.data) == bytes(made.data) == before


def test_nothing_is_nothing() -> None:
    assert list(ahead(memoryview(b""), write=False)) == []


def test_spare_work_waits_for_all_other_work(thread: TransferThread) -> None:
    order: list[str] = []

    def steps(name: str):
        for _ in range(3):
            order.append(name)
            yield

    def begin() -> None:
        thread.spare(steps("spare"))
        thread.work(steps("work"))
        thread.work(steps("more"))

    thread.post(begin)
    while len(order) < 9:
        pass
    assert order == ["work", "more"] * 3 + ["spare"] * 3


def test_reads_that_are_closed_map_nothing_ahead(pool: Make, thread: TransferThread) -> None:
    """Closed before the thread came to it, or halfway: it ends, and the mapping is let go of."""
    made = pool(num_blocks=3, block_bytes=STEP_BYTES)
    for num_steps in (0, 1):
        reads = MemoryReads(thread, map_readonly(made.readonly_fd()), made.nonce, memoryview(b""), lambda: None)
        ahead_of_reads = reads.map_ahead()
        for _ in range(num_steps):
            next(ahead_of_reads)
        reads.close(LeaseLost("over"))
        assert list(ahead_of_reads) == []
