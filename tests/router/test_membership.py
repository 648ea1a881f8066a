"""The judgement of silence and a group's life, under every order of events: no trap, no death out of turn, one verdict per silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import MembershipConfig
from baton.errors import InternalError
from router.group import Group, Role
from router.heard import GroupLoad
from router.membership import GROUP_LIFE, UP, GroupEvent, GroupState, NodeReport, judge, own_pause
from router.registry import Registry
from tests.router.test_registry import hello

TIMES = st.floats(0, 1e6, allow_nan=False)
SETTINGS = MembershipConfig()


@given(TIMES, TIMES, st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_silence_is_judged_by_its_length_alone(heard_s: float, silent_s: float, suspect_s: float, more_s: float) -> None:
    dead_s = suspect_s + more_s
    verdict = judge(heard_s + silent_s, heard_s, suspect_s=suspect_s, dead_s=dead_s)
    length_s = heard_s + silent_s - heard_s  # what is left of it in floating point
    expected = GroupEvent.EXPIRE if length_s >= dead_s else GroupEvent.SILENT if length_s >= suspect_s else None
    assert verdict is expected


@given(TIMES, st.floats(0, 1000), st.floats(0.01, 10))
def test_only_a_pause_of_its_own_excuses_others(looked_s: float, away_s: float, beat_s: float) -> None:
    pause_s = own_pause(looked_s + away_s, looked_s, beat_s)
    assert 0 <= pause_s <= away_s
    assert (pause_s > 0) == (looked_s + away_s - looked_s - beat_s > beat_s)


@pytest.mark.parametrize("late_s", [0.0, 0.9])
def test_a_router_that_was_stopped_finds_nobody_silent(late_s: float) -> None:
    """Stopped for a minute: what was heard a moment before counts from the moment it went on."""
    settings, heard_s, looked_s, now_s = SETTINGS, 99.5, 100.0, 160.0 + late_s
    heard_s += own_pause(now_s, looked_s, settings.beat_s)
    assert judge(now_s, heard_s, suspect_s=settings.suspect_s, dead_s=settings.dead_s) is None


def test_the_table_has_no_trap_and_no_death_out_of_turn() -> None:
    living = [state for state in GroupState if state is not GroupState.REMOVED]
    for state in living:
        assert GROUP_LIFE.after(state, GroupEvent.HELLO) is GroupState.READY, "whatever happened, a good hello brings it back"
        assert GROUP_LIFE.after(state, GroupEvent.REMOVE) is GroupState.REMOVED
        assert GROUP_LIFE.allows(state, GroupEvent.EXPIRE) is (state is not GroupState.DEAD), "there is one verdict per silence"
        assert GROUP_LIFE.allows(state, GroupEvent.HEARD) is (state in UP), "what is late brings nobody back"
        assert GROUP_LIFE.allows(state, GroupEvent.BROKE) is (state in UP), "only what is open can break"
        assert GROUP_LIFE.allows(state, GroupEvent.REFUSE) is (state not in UP)
    assert GROUP_LIFE.ends(GroupState.REMOVED)
    assert GROUP_LIFE.start is GroupState.JOINING
    with pytest.raises(InternalError, match="silent is impossible while gone"):
        GROUP_LIFE.after(GroupState.GONE, GroupEvent.SILENT)


class Cluster:
    """A registry with the groups of two nodes, and what a link does to one: hello first, and nothing after a break."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.groups = [
            self.registry.add(role, f"{role}:{number}") for role, number in ((Role.PREFILL, 0), (Role.DECODE, 0), (Role.DECODE, 1))
        ]
        self.verdicts = dict.fromkeys(range(3), 0)  # deaths since the last word

    def do(self, index: int, what: str) -> None:
        group = self.groups[index]
        match what:
            case "hello" | "rebirth":
                life = 1 if what == "hello" else 2
                self.registry.joined(group, hello(f"{group.role}-0", group_number(group), life), GroupLoad())
                self.verdicts[index] = 0
            case "load" | "draining load":
                self.registry.loaded(group, GroupLoad(draining=what != "load"))
            case "silent" | "expire":
                event = GroupEvent(what)
                news = self.registry.judged(group, event, "silent")
                self.verdicts[index] += news and event is GroupEvent.EXPIRE
            case "broke" if group.up:
                self.registry.lost(group, "cut")
            case "refuse" if not group.up:
                self.registry.refused(group, "protocol 1")
                self.verdicts[index] = 0
            case "drain":
                self.registry.drain(group.node)
            case "restore":
                self.registry.restore(group.node)


def group_number(group: Group) -> int:
    return int(group.address.rpartition(":")[2])


WHATS = ["hello", "rebirth", "load", "draining load", "silent", "expire", "broke", "refuse", "drain", "restore", "prove"]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(WHATS)), max_size=40))
def test_whatever_happens_only_groups_that_speak_and_may_work_get_work(steps: list[tuple[int, str]]) -> None:
    cluster = Cluster()
    for index, what in steps:
        cluster.do(index, what)
        if what == "prove":
            for pair in cluster.registry.pairs():
                pair.proven |= pair.reachable
        assert max(cluster.verdicts.values()) <= 1
        for pair in cluster.registry.usable():
            assert all(group.state is GroupState.READY and group.hello and not group.refusal for group in pair.groups)
            assert all(
                other.state not in (GroupState.SUSPECT, GroupState.GONE, GroupState.DEAD) for other in siblings(cluster, pair.groups)
            )
        for group in cluster.groups:
            assert bool(group.refusal) is (group.state is GroupState.REFUSED)
    for index in range(3):
        cluster.do(index, "rebirth")
        cluster.do(index, "restore")
        cluster.do(index, "load")
    assert all(group.ready for group in cluster.groups), "nothing that happened is for good"


def siblings(cluster: Cluster, groups: tuple[Group, ...]) -> list[Group]:
    return [other for group in groups for other in cluster.registry.of(group.node) if other.number != group.number]


@pytest.mark.parametrize(
    ("report", "said", "coming"),
    [
        (NodeReport("decode-1", "decode", "serving"), "", False),
        (NodeReport("decode-1", "decode", "starting"), "decode-1 is being built: starting", True),
        (NodeReport("decode-1", "decode", "loading", "rank 0 died", 2), "decode-1 is being rebuilt: loading (rank 0 died)", True),
        (NodeReport("decode-1", "decode", "broken", "rank 0 died"), "decode-1 is broken (rank 0 died)", True),
        (NodeReport("decode-1", "decode", "waiting", "no weights"), "decode-1 waits to be rebuilt (no weights)", True),
        (NodeReport("decode-1", "decode", "retiring"), "decode-1 is being taken down", False),
        (NodeReport("decode-1", "decode", "retired"), "decode-1 is retired", False),
    ],
)
def test_a_report_in_words(report: NodeReport, said: str, coming: bool) -> None:
    assert (report.said, report.coming) == (said, coming)
