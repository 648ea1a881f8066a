"""The policy sends work to open, proven pairs only, to the least loaded of them, and equal views get equal choices."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from router.policy import GroupView, Sharing, choose


def prefill(name, **more):
    return GroupView(name, "prefill", **more)


def decode(name, **more):
    return GroupView(name, "decode", **{"usable_blocks": 10, "block_size": 16, **more})


def all_pairs(groups):
    """Every pair, those of a decode group alone included."""
    sources = [None, *(view.name for view in groups if view.role == "prefill")]
    return [(source, view.name) for source in sources for view in groups if view.role == "decode"]


def chosen(groups, prompt_len=10, **more):
    return choose(groups, all_pairs(groups), prompt_len, **more)


def test_prefill_with_the_fewest_tokens_and_decode_with_the_fewest_sequences():
    groups = [
        prefill("p0", waiting_tokens=900),
        prefill("p1", waiting_tokens=100, sent_tokens=300, waiting_sequences=9),
        decode("d0", running_sequences=3),
        decode("d1", running_sequences=1, sent_sequences=1),
    ]
    assert chosen(groups) == ("p1", "d1")


def test_a_decode_group_with_room_goes_first():
    groups = [prefill("p0"), decode("d0", running_sequences=1, usable_blocks=1), decode("d1", running_sequences=9)]
    assert chosen(groups, prompt_len=16) == ("p0", "d0")
    assert chosen(groups, prompt_len=17) == ("p0", "d1")
    groups[1] = replace(groups[1], sent_tokens=10)
    assert chosen(groups, prompt_len=7) == ("p0", "d1"), "what was sent takes room too"


def test_a_full_group_is_better_than_none():
    assert chosen([prefill("p0"), decode("d0", usable_blocks=0)]) == ("p0", "d0")


def test_ties_go_to_the_smaller_name():
    groups = [prefill("p1"), prefill("p0"), decode("d1"), decode("d0")]
    assert chosen(groups) == chosen(groups[::-1]) == ("p0", "d0")


def test_only_proven_pairs():
    groups = [prefill("p0"), prefill("p1", waiting_tokens=50), decode("d0"), decode("d1")]
    assert choose(groups, [("p1", "d1")], 10) == ("p1", "d1")
    assert choose(groups, [("p9", "d1"), ("p0", "d9")], 10) is None
    assert choose(groups, [], 10) is None
    assert choose([*groups, decode("d9", ready=False)], [("p0", "d9"), (None, "d9")], 10) is None


def test_groups_that_failed_before_are_the_last_resort():
    groups = [prefill("p0"), decode("d0"), decode("d1", running_sequences=50)]
    assert chosen(groups, avoid={"d0"}) == ("p0", "d1")
    assert chosen(groups, avoid={"d0", "d1"}) == ("p0", "d0")


def test_only_decode_is_chosen_where_the_blocks_are_already():
    groups = [prefill("p0"), prefill("p1", draining=True), decode("d0", draining=True), decode("d1")]
    assert chosen(groups) == ("p0", "d1")
    assert chosen(groups, prefill="p1") == ("p1", "d1")
    assert chosen(groups, prefill="p7") is None


def test_a_decode_group_is_alone_only_while_no_prefill_group_is_open():
    groups = [prefill("p0"), decode("d0")]
    assert choose(groups, [(None, "d0")], 10) is None, "an open prefill group will soon be proven with it"
    assert choose(groups, [("p0", "d0"), (None, "d0")], 10) == ("p0", "d0")
    for closed in (replace(groups[0], draining=True), replace(groups[0], ready=False)):
        assert choose([closed, groups[1]], [("p0", "d0"), (None, "d0")], 10) == (None, "d0")
    assert choose([groups[1]], [(None, "d0")], 10) == (None, "d0")
    assert choose([groups[1]], [(None, "d0")], 10, prefill="p0") is None, "blocks that are there are read by a pair of two"


def test_alone_the_prompts_that_wait_count_first():
    groups = [decode("d0", running_sequences=9), decode("d1", waiting_tokens=100), decode("d2", sent_tokens=50, running_sequences=1)]
    assert chosen(groups) == (None, "d0")
    assert chosen(groups, avoid={"d0"}) == (None, "d2")
    assert chosen([decode("d0", usable_blocks=0), decode("d1", waiting_tokens=9000)]) == (None, "d1"), "room goes before that"


VIEWS = st.builds(
    GroupView,
    name=st.sampled_from("abcdefgh"),
    role=st.sampled_from(["prefill", "decode"]),
    ready=st.booleans(),
    draining=st.booleans(),
    waiting_sequences=st.integers(0, 3),
    running_sequences=st.integers(0, 3),
    waiting_tokens=st.integers(0, 3),
    usable_blocks=st.integers(0, 3),
    block_size=st.just(16),
)
GROUPS = st.lists(VIEWS, max_size=8, unique_by=lambda view: view.name)


@given(GROUPS, st.integers(0, 50), st.sets(st.sampled_from("abcdefgh")), st.randoms())
def test_the_choice_is_open_and_does_not_depend_on_order(groups, prompt_len, avoid, random):
    choice = chosen(groups, prompt_len, avoid=avoid)
    open_names = {view.name for view in groups if view.ready and not view.draining}
    prefill_open = any(view.role == "prefill" and view.name in open_names for view in groups)
    open_pairs = [pair for pair in all_pairs(groups) if {name for name in pair if name} <= open_names]
    usable = [(source, target) for source, target in open_pairs if (source is None) != prefill_open]
    assert (choice in usable) if usable else choice is None
    assert not any(set(pair).isdisjoint(avoid) for pair in usable) or set(choice).isdisjoint(avoid)
    random.shuffle(groups)
    assert chosen(groups, prompt_len, avoid=avoid) == choice


@given(GROUPS, st.integers(0, 50), st.sampled_from("abcdefgh"))
def test_where_the_blocks_are_is_kept(groups, prompt_len, source):
    choice = chosen(groups, prompt_len, prefill=source)
    takers = {view.name for view in groups if view.role == "decode" and view.open}
    there = any(view.name == source and view.role == "prefill" for view in groups)
    assert (choice is not None and choice[0] == source and choice[1] in takers) if there and takers else choice is None


SHARING = Sharing(max_prompt_tokens=512, step_tokens=64)


def shared(groups, prompt_len, sharing=SHARING):
    return choose(groups, [("p0", "d0"), (None, "d0")], prompt_len, sharing=sharing)


def test_a_short_prompt_is_computed_by_decode_when_prefill_is_far_behind_and_few_streams_are_held_up():
    behind, ahead = prefill("p0", waiting_tokens=4000, waiting_sequences=8), prefill("p0")
    few, many = decode("d0", usable_blocks=999, running_sequences=4), decode("d0", usable_blocks=999, running_sequences=200)
    assert shared([behind, few], 500) == (None, "d0")
    assert shared([ahead, few], 500) == ("p0", "d0"), "nobody waits"
    assert shared([behind, many], 500) == ("p0", "d0"), "too many would wait for it"
    assert shared([behind, few], 513) == ("p0", "d0"), "too long"
    assert shared([behind, few], 500, Sharing()) == ("p0", "d0")
    assert shared([behind, replace(few, usable_blocks=1)], 500) == ("p0", "d0"), "no room"
    assert shared([behind, replace(few, sent_prompt_tokens=9000)], 500) == ("p0", "d0"), "decode is further behind"
    assert shared([behind, replace(few, sent_tokens=9000)], 500) == (None, "d0"), "what it pulls it need not compute"
    assert choose([behind, few], [("p0", "d0")], 500, sharing=SHARING) == ("p0", "d0"), "not proven"
    assert choose([behind, few], [("p0", "d0"), (None, "d0")], 500, avoid=["d0"], sharing=SHARING) == ("p0", "d0")
    assert choose([behind, few], [("p0", "d0"), (None, "d0")], 500, prefill="p0", sharing=SHARING) == ("p0", "d0")


@given(st.integers(0, 9000), st.integers(0, 64), st.integers(0, 9000), st.integers(0, 256), st.integers(1, 512))
def test_the_more_waits_at_prefill_the_rather_decode_computes(waiting_tokens, num_waiting, pending, num_running, prompt_len):
    ours = decode("d0", usable_blocks=9999, running_sequences=num_running, waiting_tokens=pending)
    less = shared([prefill("p0", waiting_tokens=waiting_tokens, waiting_sequences=num_waiting), ours], prompt_len)
    more = shared([prefill("p0", waiting_tokens=waiting_tokens + 64, waiting_sequences=num_waiting + 1), ours], prompt_len)
    assert less[0] == "p0" or more[0] is None
