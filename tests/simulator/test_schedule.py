"""A seed is a schedule: always the same one, possible to serve, and together they try everything."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from simulator.schedule import BLOCK_SIZE, KINDS, MAX_MODEL_LEN, SEASONS, schedule

seeds = st.integers(0, 2**63)


@given(seeds)
def test_a_seed_is_one_schedule(seed):
    assert schedule(seed) == schedule(seed)


@given(seeds)
def test_every_request_can_be_served(seed):
    plan = schedule(seed)
    for ask in plan.asks:
        assert len(ask.prompt_ids) + ask.max_tokens <= MAX_MODEL_LEN
    assert all(node.num_blocks * BLOCK_SIZE >= MAX_MODEL_LEN for node in plan.nodes)


@given(seeds)
def test_faults_have_targets(seed):
    plan = schedule(seed)
    groups = {name for node in plan.nodes for name in node.group_names()}
    for fault in plan.faults:
        assert fault.target in groups | {node.name for node in plan.nodes}
        assert not fault.far or fault.far in groups


def test_all_seasons_and_kinds_of_faults_come():
    plans = [schedule(seed) for seed in range(3000)]
    assert Counter(plan.season for plan in plans).keys() == SEASONS.keys()
    assert {fault.kind for plan in plans for fault in plan.faults} == {kind for kinds in KINDS.values() for kind in kinds}


def test_layouts_differ():
    shapes = {tuple((node.role, node.groups) for node in schedule(seed).nodes) for seed in range(500)}
    assert len(shapes) > 8
