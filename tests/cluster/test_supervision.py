"""The life of a node, and the pause before it is built again: short after a good life, growing, bounded, and never for good."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InternalError
from cluster.supervision import BUILDING, FIRST_PAUSE_S, NODE_LIFE, STEADY_S, Backoff, NodeEvent, NodeState

events = st.lists(st.sampled_from(list(NodeEvent)), max_size=60)
served_s = st.one_of(st.just(0.0), st.floats(0.0, 100.0))


@given(events)
def test_processes_are_ended_before_anything_else_happens_to_a_node(steps: list[NodeEvent]) -> None:
    """Whatever comes in whatever order: a new life begins only after the end of the one before, and slots are given back only then."""
    state, ended = NODE_LIFE.start, True
    for event in steps:
        if not NODE_LIFE.allows(state, event):
            continue
        before, state = state, NODE_LIFE.after(state, event)
        if event is NodeEvent.ENDED:
            ended = True
        if before is NodeState.STARTING:
            ended = False
        if state in (NodeState.PLACING, NodeState.RETIRED):
            assert ended, f"{before} {event}"


@pytest.mark.parametrize("state", [*BUILDING, NodeState.SERVING])
def test_any_failure_of_a_life_leads_to_its_end_and_another(state: NodeState) -> None:
    after = [NODE_LIFE.after(state, NodeEvent.BROKE)]
    for event in (NodeEvent.ENDED, NodeEvent.DUE):
        after.append(NODE_LIFE.after(after[-1], event))
    assert after == [NodeState.BROKEN, NodeState.WAITING, NodeState.PLACING]


def test_a_wish_does_not_interrupt_the_end_of_a_life() -> None:
    for state in (NodeState.BROKEN, NodeState.RETIRING):
        for wish in (NodeEvent.RETIRE, NodeEvent.RESTORE):
            with pytest.raises(InternalError, match="impossible"):
                NODE_LIFE.after(state, wish)


def test_down_ends_every_state_and_nothing_follows() -> None:
    for state in set(NodeState) - {NodeState.GONE}:
        assert NODE_LIFE.after(state, NodeEvent.DOWN) is NodeState.GONE
    assert NODE_LIFE.ends(NodeState.GONE)


@given(st.lists(served_s, max_size=200), st.floats(0.01, 1e4))
def test_a_pause_is_bounded_and_grows_while_lives_stay_short(lives: list[float], max_s: float) -> None:
    backoff, before_s = Backoff(), 0.0
    for life_s in lives:
        backoff = backoff.broke(life_s)
        pause_s = backoff.pause_s(max_s)
        assert 0.0 <= pause_s <= max_s
        assert pause_s >= before_s or life_s >= STEADY_S
        before_s = pause_s


@given(st.integers(0, 10**6), st.floats(STEADY_S, 1e6))
def test_one_good_life_is_enough(breaks: int, life_s: float) -> None:
    assert Backoff(breaks).broke(life_s).pause_s(60.0) == 0.0


def test_the_pauses_of_a_node_that_never_comes_up() -> None:
    backoff, pauses = Backoff(), []
    for _ in range(10):
        backoff = backoff.broke(0.0)
        pauses.append(backoff.pause_s(60.0) / FIRST_PAUSE_S)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
