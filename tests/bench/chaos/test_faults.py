"""A plan of faults is drawn from a seed, spreads kinds and targets evenly, and leaves a router's death alone in time."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bench.chaos.faults import STOP_S, USUAL, Kind, plan

RANKS = ("prefill-0/0", "prefill-1/0", "decode-0/0", "decode-1/0")


def test_kinds_and_targets_are_even():
    faults = plan(80, USUAL, RANKS, 1, 0.1)
    assert set(Counter(fault.kind for fault in faults).values()) == {10}
    for kind in (Kind.KILL, Kind.STOP):
        struck = Counter(fault.target for fault in faults if fault.kind is kind)
        assert set(struck) == set(RANKS) and set(struck.values()) <= {2, 3}
    assert {fault.target for fault in faults if fault.kind not in (Kind.KILL, Kind.STOP)} == {""}
    assert {fault.label for fault in faults if fault.kind is Kind.KILL} == {"kill prefill", "kill decode"}
    assert {fault.hold_s for fault in faults if fault.kind is Kind.STOP} == {STOP_S}


@given(num=st.integers(0, 60), kinds=st.sets(st.sampled_from(Kind), min_size=1), seed=st.integers(), overlap=st.floats(0, 1))
def test_a_plan_is_what_was_asked_for(num, kinds, seed, overlap):
    faults = plan(num, sorted(kinds), RANKS, seed, overlap)
    assert faults == plan(num, sorted(kinds), RANKS, seed, overlap)
    assert [fault.number for fault in faults] == list(range(num))
    assert {fault.kind for fault in faults} <= kinds
    for before, after in itertools.pairwise(faults):
        assert not (before.overlaps and Kind.ROUTER in (before.kind, after.kind))
    assert all(0 <= fault.pick < 1 and 0 < fault.after_share < 1 and fault.delay_s >= 0 for fault in faults)
