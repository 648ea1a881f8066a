"""Cores of a host are shared out without gap or overlap, lent while they are idle, and taken back from the dead."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranks.cores import BELIEVED_MS, PAUSE_MS, Caution, Doing, Ledger, Slot, cores_now, is_busy, own_cores, was_worth_it

ALL, MINE = (0, 1, 2, 3), (0, 2)  # of four cores, for the rank in slot 0: while it is alone, and beside a busy one in slot 1
ROOT = Path(__file__).resolve().parent.parent.parent
# A rank in a process of its own, which does what it is told: prints the threads it may use for a step, or that it has left.
RANK = """
import sys
from pathlib import Path
from ranks.cores import Ledger
ledger = Ledger(Path(sys.argv[1]), slot=int(sys.argv[2]), num_slots=3, first=int(sys.argv[2]), num=1, cores=4)
for line in sys.stdin:
    if line == "enter\\n":
        print(*ledger.enter(), flush=True)
    elif line == "close\\n":
        print(ledger.close(), flush=True)
    else:
        print(ledger.leave(idle=line == "idle\\n"), flush=True)
"""


class Other:
    """The rank of another process."""

    def __init__(self, path: Path, slot: int) -> None:
        command = [sys.executable, "-c", RANK, str(path), str(slot)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def told(self, what: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cores"


@pytest.fixture
def other(path: Path) -> Iterator[Other]:
    rank = Other(path, 1)
    yield rank
    rank.end()


def ledger(path: Path, slot: int = 0, num: int = 1) -> Ledger:
    return Ledger(path, slot=slot, num_slots=3, first=slot, num=num, cores=4)


@st.composite
def busy_ranks(draw: st.DrawFn) -> tuple[int, list[tuple[int, ...]]]:
    """The cores of a host, and those that each busy rank owns."""
    cores = draw(st.integers(1, 64))
    owned = draw(st.lists(st.integers(0, cores - 1), unique=True, min_size=1))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(owned) - 1)), max_size=8)) - {len(owned)})
    return cores, [tuple(owned[a:b]) for a, b in zip([0, *cuts], [*cuts, len(owned)], strict=True)]


@given(busy_ranks())
def test_busy_ranks_share_all_cores_without_overlap(host: tuple[int, list[tuple[int, ...]]]) -> None:
    cores, owns = host
    shares = [cores_now(cores, owns, me) for me in range(len(owns))]
    assert sorted(core for share in shares for core in share) == list(range(cores))
    assert all(share[: len(own)] == own for share, own in zip(shares, owns, strict=True))
    lent = [len(share) - len(own) for share, own in zip(shares, owns, strict=True)]
    assert max(lent) - min(lent) <= 1


@given(st.integers(1, 64), st.lists(st.lists(st.integers(0, 80), min_size=1), min_size=1))
def test_cores_promised_twice_are_used_by_both_and_others_by_one(cores: int, owns: list[list[int]]) -> None:
    shares = [cores_now(cores, owns, me)[len(own) :] for me, own in enumerate(owns)]
    lent = [core for share in shares for core in share]
    assert len(lent) == len(set(lent))
    assert set(lent) == set(range(cores)) - {core for own in owns for core in own}


@given(st.integers(1, 64), st.integers(0, 128), st.integers(1, 64))
def test_own_cores_exist(cores: int, first: int, num: int) -> None:
    own = own_cores(cores, first, num)
    assert len(own) == num and own[0] == first % cores
    assert set(own) <= set(range(cores)) and len(set(own)) == min(num, cores)


@given(st.sampled_from(Doing), st.integers(0, 10 * BELIEVED_MS), st.booleans())
def test_who_is_idle_dead_or_long_between_steps_lends(doing: Doing, age_ms: int, alive: bool) -> None:
    busy = is_busy(Slot(pid=1, own=(0,), doing=doing, age_ms=age_ms), lambda pid: alive)
    if doing is Doing.STEPPING:
        assert busy == (alive or age_ms <= BELIEVED_MS)
    else:
        assert busy == (doing is Doing.PAUSED and age_ms <= PAUSE_MS)


@given(st.integers(1, 16), st.integers(1, 16), st.floats(0.001, 10), st.floats(0, 1))
def test_borrowing_is_worth_it_only_where_it_was_faster(num_own: int, num_lent: int, wall_s: float, share: float) -> None:
    num_used, cpu_s = num_own + num_lent, share * wall_s
    worth = was_worth_it(num_own, num_used, cpu_s, wall_s)
    if worth:
        assert wall_s <= cpu_s * num_used / num_own, "it would have been done sooner alone"
    assert was_worth_it(num_own, num_used, wall_s, wall_s)
    assert not was_worth_it(num_own, num_used, 0.0, wall_s)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=30))
def test_who_lost_by_borrowing_waits_longer_each_time_and_never_for_ever(steps: list[tuple[bool, float]]) -> None:
    caution, now_s, lost = Caution(), 0.0, 0
    for worth, later_s in steps:
        if caution.allows(now_s):
            before, caution = caution, caution.after(now_s, worth)
            lost = 0 if worth else lost + 1
            assert caution.allows(now_s) == worth
            assert worth or before.wait_s <= caution.wait_s <= 2.0
            assert caution.allows(now_s + min(2.0, 0.1 * 2 ** max(0, lost - 1)) + 1e-6)
        now_s += later_s


def test_an_idle_core_is_lent_and_comes_back_at_the_next_step(path: Path, other: Other) -> None:
    mine = ledger(path)
    assert mine.enter() == ALL
    assert other.told("enter") == "1 3"  # each its own, and half of what nobody owns
    mine.leave(idle=False)
    assert mine.enter() == MINE
    other.told("idle")
    mine.leave(idle=False)
    assert mine.enter() == ALL


def test_a_lent_core_comes_back_in_the_middle_of_a_step(path: Path, other: Other) -> None:
    ledger = Ledger(path, slot=0, num_slots=3, first=0, num=1, cores=4)
    assert ledger.enter() == ledger.look() == ALL
    assert other.told("enter") == "1 3"
    assert ledger.look() == MINE
    other.told("idle")
    assert ledger.look() == ALL


def test_between_two_steps_cores_are_kept_for_a_moment(path: Path, other: Other) -> None:
    mine = ledger(path)
    other.told("enter")
    other.told("paused")
    began = time.monotonic()
    while mine.enter() == MINE:
        assert time.monotonic() - began < 30
    assert mine.enter() == ALL
    assert time.monotonic() - began > PAUSE_MS / 1000 / 2


def test_a_rank_that_dies_in_a_step_lends_and_its_successor_takes_the_slot_over(path: Path, other: Other) -> None:
    mine = ledger(path)
    other.told("enter")
    assert mine.enter() == MINE
    other.end()
    began = time.monotonic()
    while mine.enter() == MINE:
        assert time.monotonic() - began < 30
    successor = Other(path, 1)
    try:
        assert mine.enter() == ALL
        assert successor.told("enter") == "1 3"
        assert mine.enter() == MINE
    finally:
        successor.end()


def test_a_long_step_of_a_living_rank_keeps_its_cores(path: Path, other: Other) -> None:
    mine = ledger(path)
    other.told("enter")
    time.sleep(2 * BELIEVED_MS / 1000)
    assert mine.enter() == MINE


def test_slots_say_who_is_there(path: Path) -> None:
    mine = ledger(path, slot=2, num=3)
    assert mine.read(0) is None and mine.read(1) is None
    mine.enter()
    said = mine.read(2)
    assert said is not None
    assert (said.pid, said.own, said.doing) == (os.getpid(), (2, 3, 0), Doing.STEPPING)


def test_the_last_one_out_removes_the_file(path: Path, other: Other) -> None:
    mine = ledger(path)
    other.told("idle")
    mine.close()
    assert path.exists()
    assert other.told("enter") == "1 0 2 3"
    mine.leave(idle=False)  # a step that outlasted the end: it disturbs nobody
    assert other.told("enter") == "1 0 2 3"
    other.told("close")
    assert not path.exists()


def test_who_closes_beside_the_dead_is_the_last_one(path: Path, other: Other) -> None:
    mine = ledger(path)
    other.told("enter")
    other.end()
    mine.close()
    assert not path.exists()
