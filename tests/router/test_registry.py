"""Groups and pairs as state: who may work with whom, when a proof ends, and what draining and losses do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Unavailable
from baton.request import BlockCounts
from router.compare import describe, refusal
from router.group import Group, Pair, Role
from router.heard import GroupLoad, Hello, Layout, PullReport
from router.membership import GroupEvent, GroupState, NodeReport
from router.registry import Registry
from router.service import pair_to_message
from router.status import status_of

LAYOUT = Layout(("block", "layer", "part", "head", "slot", "dim"), 16, (64, 64), "bfloat16", 28, 4)
BUSY = GroupLoad(running_sequences=1, blocks=BlockCounts(8, 7, 0, 1, 0))


def hello(node: str, group: int = 0, life: int = 1, **changes: object) -> Hello:
    return replace(Hello(node, group, bytes([life]) * 16, 1, "abc123", "bfloat16", "", 4096, LAYOUT), **changes)


def joined(registry: Registry, role: Role, node: str, **changes: object) -> Group:
    group = registry.add(role, f"{node}:1")
    registry.joined(group, hello(node, **changes), GroupLoad())
    return group


def of_two(registry: Registry) -> list[Pair]:
    return [pair for pair in registry.pairs() if pair.prefill]


def alone(registry: Registry) -> list[Pair]:
    return [pair for pair in registry.pairs() if not pair.prefill]


def test_a_pair_is_usable_once_both_have_joined_and_it_is_proven() -> None:
    registry = Registry()
    prefill = joined(registry, Role.PREFILL, "prefill-0")
    decode = registry.add(Role.DECODE, "decode-0:1")
    (pair,) = of_two(registry)
    assert not pair.reachable
    registry.joined(decode, hello("decode-0", 1), GroupLoad())
    assert (pair.name, pair.reachable, pair.usable) == ("prefill-0 → decode-0/1", True, False)
    pair.proven = True
    assert list(registry.usable()) == [pair]
    registry.lost(prefill, "cut")
    assert not pair.usable
    registry.joined(prefill, hello("prefill-0"), GroupLoad())
    assert pair.usable, "the same life needs no new proof"
    registry.joined(prefill, hello("prefill-0", life=2), GroupLoad())
    assert pair.reachable and not pair.usable


def test_a_group_that_was_dead_has_to_be_proven_again_even_in_the_same_life() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0")
    decode, other = joined(registry, Role.DECODE, "decode-0"), joined(registry, Role.DECODE, "decode-1")
    for pair in registry.pairs():
        pair.proven = True
    registry.judged(decode, GroupEvent.EXPIRE, "silent for 6 s")
    registry.joined(decode, hello("decode-0"), GroupLoad())
    assert [pair.decode for pair in registry.pairs() if pair.reachable] == [decode, other, decode, other]
    assert {pair.decode for pair in registry.usable()} == {other}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol_version": 2}, "protocol version: 1 there, 2 here"),
        ({"model_fingerprint": "def456"}, "model: abc123 there, def456 here"),
        ({"dtype": "float32"}, "dtype: bfloat16 there, float32 here"),
        ({"quantization": "w8a8"}, "quantization: none there, w8a8 here"),
        ({"layout": replace(LAYOUT, block_size=128)}, "block size: 16 there, 128 here"),
        ({"layout": replace(LAYOUT, axes=("block", "layer", "part", "slot", "head", "dim"))}, "part/slot/head/dim here"),
        ({"layout": replace(LAYOUT, model_num_layers=2)}, "layers: 28 there, 2 here"),
        ({"layout": replace(LAYOUT, model_num_kv_heads=8)}, "KV heads: 4 there, 8 here"),
        ({"layout": replace(LAYOUT, part_dims=(128,))}, "KV parts: 64+64 there, 128 here"),
        ({"layout": replace(LAYOUT, part_dims=(64, 128))}, "KV parts: 64+64 there, 64+128 here"),
        ({"layout": replace(LAYOUT, dtype="float8")}, "KV dtype: bfloat16 there, float8 here"),
    ],
)
def test_a_refusal_says_what_differs_and_describes_both(changes: dict[str, object], words: str) -> None:
    registry = Registry()
    prefill = joined(registry, Role.PREFILL, "prefill-0")
    decode = joined(registry, Role.DECODE, "decode-0", **changes)
    (pair,) = of_two(registry)
    assert prefill.hello and decode.hello
    there, here = describe(prefill.hello), describe(decode.hello)
    assert there != here
    assert all(said in pair.refusal for said in (words, f"prefill-0 has {there}", f"decode-0/0 has {here}"))
    assert pair.refusal.count(" there, ") == 1, "nothing else differs"
    assert not pair.reachable
    assert pair_to_message(pair).refusal == pair.refusal
    assert status_of(registry)["pairs"][0]["refusal"] == pair.refusal
    assert [other.refusal for other in alone(registry)] == [pair.refusal], "it must not answer in the place of the other, either"
    assert pair.refusal in registry.summary()
    with pytest.raises(Unavailable) as caught:
        registry.check_possible()
    assert pair.refusal in caught.value.message and not caught.value.retryable
    registry.joined(pair.decode, hello("decode-0", life=3), GroupLoad())
    assert pair.reachable, "a new life is compared anew"
    registry.check_possible()


def test_waiting_helps_as_long_as_one_pair_is_not_refused() -> None:
    registry = Registry()
    registry.check_possible()
    joined(registry, Role.PREFILL, "prefill-0")
    for number in range(6):
        joined(registry, Role.DECODE, f"decode-{number}", dtype=f"float{number}")
    with pytest.raises(Unavailable, match=r"decode-0/0.*decode-3/0.*; and 2 more"):
        registry.check_possible()
    registry.add(Role.DECODE, "decode-9:1")
    registry.check_possible()


def test_a_node_that_is_refused_stays_so_until_it_is_understood() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0")
    decode = registry.add(Role.DECODE, "decode-0:1")
    registry.refused(decode, "protocol 1, this router 2")
    (pair,) = of_two(registry)
    assert (decode.state, decode.up, pair.refusal, pair.reachable) == (GroupState.REFUSED, False, "protocol 1, this router 2", False)
    registry.drain("decode-0:1")
    registry.loaded(decode, GroupLoad())
    assert decode.state is GroupState.REFUSED
    registry.restore("decode-0:1")
    registry.joined(decode, hello("decode-0"), GroupLoad())
    assert (decode.ready, pair.refusal, pair.reachable) == (True, "", True)
    registry.lost(decode, "cut")
    registry.refused(decode, "protocol 3, this router 2")
    assert pair.refusal and not pair.reachable, "another life at the same address"
    assert registry.judged(decode, GroupEvent.EXPIRE, "silent")
    assert (decode.state, pair.refusal) == (GroupState.DEAD, ""), "nobody refuses any more"
    registry.check_possible()


def test_who_serves_alone_fits_the_cluster_it_stands_in_for() -> None:
    registry = Registry()
    prefill = joined(registry, Role.PREFILL, "prefill-0")
    joined(registry, Role.DECODE, "decode-0")
    joined(registry, Role.DECODE, "decode-1", dtype="float32")
    fitting, strange = alone(registry)
    assert (fitting.name, fitting.reachable, strange.reachable) == ("decode-0/0 alone", True, False)
    registry.remove(prefill.address)
    assert fitting.reachable and strange.refusal, "what was agreed on outlives whom it was agreed with"
    fitting.proven = True
    joined(registry, Role.PREFILL, "prefill-0", life=2, dtype="float32")
    assert not strange.refusal and fitting.refusal and not fitting.proven, "the cluster has moved to something else"


def test_a_launch_waits_for_pairs_of_two_if_there_is_prefill() -> None:
    registry = Registry()
    decode = joined(registry, Role.DECODE, "decode-0")
    alone(registry)[0].proven = True
    assert registry.complete() and list(registry.usable()) == alone(registry)
    prefill = joined(registry, Role.PREFILL, "prefill-0")
    assert not registry.complete()
    assert alone(registry)[0].usable, "although requests can be served"
    assert "0 of 1 pairs are proven and usable; decode groups that can serve alone: 1" in registry.summary()
    of_two(registry)[0].lasting_failures = 3
    with pytest.raises(Unavailable, match="passed its proof"):
        registry.check_provable()
    of_two(registry)[0].proven = True
    assert registry.complete()
    assert of_two(registry)[0].readable(prefill)
    registry.drain("prefill-0")
    assert of_two(registry)[0].readable(prefill) and not of_two(registry)[0].usable, "what lies there may still be read"
    registry.lost(decode, "cut")
    assert not of_two(registry)[0].readable(prefill)


def test_a_silent_group_holds_the_others_of_its_node() -> None:
    """Ranks that step together wait for each other, so a beating event loop says little about the siblings of a silent group."""
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0")
    first, second = (registry.add(Role.DECODE, f"decode-0:{number}") for number in range(2))
    for number, group in enumerate((first, second)):
        registry.joined(group, hello("decode-0", number), GroupLoad())
    other = joined(registry, Role.DECODE, "decode-1")
    for pair in registry.pairs():
        pair.proven = True
    assert registry.judged(second, GroupEvent.SILENT, "")
    assert (first.ready, first.held_by, other.ready, registry.of("decode-0")) == (False, "decode-0/1", True, (first, second))
    assert {pair.decode for pair in registry.usable()} == {other}
    assert "decode-0/0 has to wait for decode-0/1" in registry.summary()
    registry.loaded(second, GroupLoad())
    assert first.ready and second.ready
    registry.lost(second, "cut")
    assert not first.ready
    reborn = registry.add(Role.DECODE, "decode-0:2")
    registry.joined(reborn, hello("decode-0", 1, life=2), GroupLoad())
    assert first.ready, "another has taken the place of the lost one"
    registry.remove(reborn.address)
    assert not first.ready
    registry.remove(second.address)
    assert first.ready


def test_what_the_supervisor_says_is_part_of_how_things_stand() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0")
    registry.refused(registry.add(Role.DECODE, "decode-0:1"), "protocol 1")
    registry.reports["decode-1"] = NodeReport("decode-1", "decode", "loading", "rank 1 died", lives=2)
    assert "decode-1 is being rebuilt: loading (rank 1 died)" in registry.summary()
    registry.check_possible()
    registry.reports["decode-1"] = NodeReport("decode-1", "decode", "retired")
    with pytest.raises(Unavailable, match="protocol 1"):
        registry.check_possible()
    assert status_of(registry)["nodes"] == [{"node": "decode-1", "role": "decode", "stage": "retired", "why": "", "lives": 1}]


def test_a_failed_proof_is_part_of_how_things_stand() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0")
    joined(registry, Role.DECODE, "decode-0")
    registry.pairs()[0].last_error = "cannot reach it"
    assert registry.summary().endswith(": prefill-0 → decode-0/0: cannot reach it")
    registry.check_possible()
    registry.pairs()[0].proven = True
    assert registry.summary().endswith("usable")


def test_what_may_differ_does_not_matter() -> None:
    assert refusal(hello("prefill-0"), hello("decode-0", 3, life=9, max_model_len=128, transfer_address="x:1")) == ""


def test_draining_takes_no_new_work_and_outlives_a_reconnect() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0")
    decode = joined(registry, Role.DECODE, "decode-0")
    assert registry.drain("decode-0") == (decode,)
    assert registry.drain("nobody") == ()
    assert decode.state is GroupState.DRAINING
    registry.lost(decode, "cut")
    registry.joined(decode, hello("decode-0", life=2), GroupLoad())
    assert decode.state is GroupState.DRAINING


def test_the_wish_to_drain_belongs_to_the_node_whatever_life_it_is_in() -> None:
    registry = Registry()
    decode = joined(registry, Role.DECODE, "decode-0")
    registry.drain("decode-0")
    registry.remove(decode.address)
    reborn = registry.add(Role.DECODE, "decode-0:2")
    registry.joined(reborn, hello("decode-0", life=2), GroupLoad())
    assert reborn.state is GroupState.DRAINING
    registry.judged(reborn, GroupEvent.SILENT, "")
    registry.loaded(reborn, GroupLoad())
    assert reborn.state is GroupState.DRAINING
    assert registry.restore("decode-0") == (reborn,)
    assert reborn.ready
    registry.drain("decode-9")
    assert joined(registry, Role.DECODE, "decode-9").ready, "nobody knew it then"


def test_a_node_may_drain_by_itself_and_come_back() -> None:
    registry = Registry()
    group = joined(registry, Role.DECODE, "decode-0")
    registry.loaded(group, replace(BUSY, draining=True))
    assert group.state is GroupState.DRAINING and not group.idle
    registry.loaded(group, GroupLoad())
    assert group.ready and group.idle
    registry.lost(group, "cut")
    registry.loaded(group, GroupLoad())
    assert group.state is GroupState.GONE, "a late load does not bring a lost node back"


def test_what_was_sent_counts_until_the_next_word() -> None:
    registry = Registry()
    group = joined(registry, Role.DECODE, "decode-0")
    group.sent_sequences, group.sent_tokens = 2, 50
    assert not group.idle
    registry.loaded(group, GroupLoad(), sent_sequences=1, sent_tokens=20)
    assert (group.sent_sequences, group.sent_tokens, group.idle) == (1, 20, False), "it has not taken all of it yet"
    registry.loaded(group, GroupLoad())
    assert (group.sent_sequences, group.sent_tokens) == (0, 0)


def test_draining_does_not_forget_what_was_just_sent() -> None:
    registry = Registry()
    group = joined(registry, Role.DECODE, "decode-0")
    group.sent_sequences = 1
    registry.drain("decode-0")
    assert group.state is GroupState.DRAINING
    assert not group.idle, "the figures are older than what was sent"


def test_pulls_add_up() -> None:
    group = Group("decode-0:1", Role.DECODE)
    for _ in range(2):
        group.pulls = group.pulls.plus(PullReport("r", 1, 3, 1, 4096, 0.5, 0.25, "shm"))
    assert (group.pulls.pulls, group.pulls.blocks_pulled, group.pulls.bytes_pulled, group.pulls.seconds) == (2, 6, 8192, 1.0)


@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(list(Role)), st.integers(0, 3)), max_size=30))
def test_there_is_a_pair_for_every_two_groups_and_for_decode_alone(steps: list[tuple[str, Role, int]]) -> None:
    registry = Registry()
    for what, role, number in steps:
        if what == "add":
            registry.add(role, f"{role}:{number}")
        else:
            registry.remove(f"{role}:{number}")
    by_role = {role: [group for group in registry.groups() if group.role is role] for role in Role}
    expected = {(prefill, decode) for prefill in (None, *by_role[Role.PREFILL]) for decode in by_role[Role.DECODE]}
    assert {(pair.prefill, pair.decode) for pair in registry.pairs()} == expected
    assert len(registry.pairs()) == len(expected)
    assert registry.max_model_len() is None


def test_the_shortest_ready_group_limits_the_cluster() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0", max_model_len=2048)
    short = joined(registry, Role.DECODE, "decode-0", max_model_len=512)
    assert registry.max_model_len() == 512
    registry.lost(short, "cut")
    assert registry.max_model_len() == 2048
    assert registry.summary().startswith("1 of 1 prefill nodes and 0 of 1 decode groups are ready; 0 of 1 pairs")


def test_a_group_that_nobody_can_work_with_limits_nobody() -> None:
    registry = Registry()
    joined(registry, Role.PREFILL, "prefill-0", max_model_len=2048)
    joined(registry, Role.DECODE, "decode-0", max_model_len=1024)
    joined(registry, Role.DECODE, "decode-1", max_model_len=16, dtype="float32")
    assert registry.max_model_len() == 1024


def test_a_wish_about_an_address_ends_with_it_if_nobody_there_has_said_its_name() -> None:
    registry = Registry()
    registry.add(Role.DECODE, "host:1")
    assert registry.drain("host:1")
    registry.remove("host:1")
    another = registry.add(Role.DECODE, "host:1")
    registry.joined(another, hello("decode-0"), GroupLoad())
    assert another.ready
