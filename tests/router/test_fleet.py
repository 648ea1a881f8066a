"""What passes between router and nodes beside a request's own words: cancels that got lost, loads that say nothing new."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import BatonError, DeadlineExceeded, NodeLost, NotFound, Unavailable
from baton.request import Sampling, SequenceRequest, TokenEvent
from router.flush import Flushed
from router.group import Group
from router.heard import GroupLoad, Heard
from router.nodes import MAX_QUEUED_COMMANDS
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode
from tests.router.test_dispatch import asked, collect, echo, nodes, text_of, until


async def test_cancels_that_a_node_does_not_read_stay_owed(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    link = dispatcher.fleet.link(dispatcher.fleet.registry.pairs()[0].decode)
    for number in range(MAX_QUEUED_COMMANDS + 1):  # in one go: the link's writer does not run meanwhile
        link.cancel(f"late-{number}", 1, "test")
    await until(lambda: (f"late-{MAX_QUEUED_COMMANDS}", 1) in decode.cancelled, "the next stream to pay")
    await until(dispatcher.ready, "the node to be back")


async def test_a_sequence_that_nobody_waits_for_is_ended(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode)
    pair = dispatcher.fleet.registry.pairs()[0]
    forgotten = SequenceRequest("forgotten", 1, (1, 2, 3), Sampling(max_tokens=3000))
    source, target = dispatcher.fleet.link(pair.prefill), dispatcher.fleet.link(pair.decode)
    target.decode(forgotten, source, 7, 20.0, introduce=False)
    await until(lambda: ("forgotten", 1) in decode.cancelled and not decode.num_active, "its end")


class Witness:
    """A carrier that remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def on_tokens(self, group: Group, event: TokenEvent) -> None:
        self.told.append(("token", group.name, event.attempt, event.output_index))

    def on_drawn(self, group: Group, attempt: int, output_index: int, token_id: int) -> None:
        self.told.append(("drawn", group.name, attempt, output_index))

    def on_accepted(self, group: Group, attempt: int) -> None:
        self.told.append(("accepted", group.name, attempt))

    def on_failed(self, group: Group, attempt: int, error: BatonError) -> None:
        self.told.append(("failed", group.name, attempt, error.cause))

    def on_known(self, group: Group, attempt: int, next_index: int) -> None:
        self.told.append(("known", group.name, attempt, next_index))

    def on_lost(self, group: Group, error: NodeLost) -> None:
        self.told.append(("lost", group.name, error.cause))

    def look(self, now_s: float) -> None:
        self.told.append(("look",))

    def hand_over(self, group: Group) -> bool:
        self.told.append(("hand over", group.name))
        return True

    def abandon(self, error: BatonError) -> None:
        self.told.append(("abandoned", error.cause))


async def test_a_node_that_is_asked_for_an_attempt_says_how_far_it_is_or_that_it_is_unknown(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    fleet = (await make_dispatcher(prefill, decode)).fleet
    decode.faults.quiet = True
    pair, witness = fleet.registry.pairs()[0], Witness()
    link = fleet.link(pair.decode)
    fleet.enter("mine", witness)
    link.decode(SequenceRequest("mine", 4, (1, 2, 3), Sampling(max_tokens=9), emitted_ids=(1, 2)), None, 0, 20.0)
    link.check("mine", 4)
    link.check("mine", 3)
    expected = {("accepted", "decode-0/0", 4), ("failed", "decode-0/0", 3, "unknown_attempt"), ("known", "decode-0/0", 4, 2)}
    await until(lambda: set(witness.told) - {("look",)} == expected, "the answers")
    fleet.leave("mine")
    fleet.heard(link, Heard(known=(("mine", 4, 2),)))  # late: dropped


async def test_every_beat_has_every_carrier_look_after_itself(make_dispatcher: MakeDispatcher) -> None:
    fleet = (await make_dispatcher(*nodes(), beat_s=0.02, dead_beats=1000)).fleet
    witness = Witness()
    fleet.enter("mine", witness)
    await until(lambda: witness.told[:3] == [("look",)] * 3, "three beats")
    fleet.leave("mine")


async def test_what_was_sent_counts_until_the_node_says_that_it_has_taken_it(make_dispatcher: MakeDispatcher) -> None:
    """A load that was under way meanwhile does not say so."""
    prefill, decode = nodes()
    fleet = (await make_dispatcher(prefill, decode)).fleet
    group = fleet.registry.pairs()[0].decode
    link = fleet.link(group)
    await until(lambda: group.idle and link.unread == (0, 0, 0), "the proof's end")
    link.decode(SequenceRequest("mine", 1, (1, 2, 3), Sampling(max_tokens=9), emitted_ids=(1,)), None, 0, 20.0)
    fleet.heard(link, Heard(load=GroupLoad()))
    assert (group.sent_sequences, group.sent_tokens, group.sent_prompt_tokens, group.idle) == (1, 4, 4, False)
    await until(lambda: group.idle, "the node to have taken and ended it")
    assert decode.received[-1].request_id == "mine"
    decode.faults.unrefined = True
    link.decode(SequenceRequest("other", 1, (1, 2, 3), Sampling(max_tokens=9)), None, 0, 20.0)
    await until(lambda: link.unread == (0, 0, 0), "any word of a node that does not count")


async def test_two_nodes_of_one_name_both_get_work(make_dispatcher: MakeDispatcher) -> None:
    """As long as one takes the other's place, neither hides the other."""
    prefill, decode = nodes(step_s=0.01)
    namesake = EchoNode("decode", "decode-0", step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode, namesake)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "all proofs")
    answers = [asyncio.create_task(collect(dispatcher, asked(max_tokens=30))) for _ in range(4)]
    await until(lambda: decode.num_active == namesake.num_active == 2, "both to run")
    assert [text_of(await answer) for answer in answers] == [echo(30)] * 4


async def test_a_decode_group_serves_alone_while_no_prefill_node_is_there(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(decode)
    chunks = await collect(dispatcher, asked(max_tokens=30))
    assert (text_of(chunks), chunks[-1].served_by) == (echo(30), ("decode-0/0",))
    assert not decode.num_introductions and not any(decode.leases), "no lease is named"
    (pair,) = dispatcher.status()["pairs"]
    assert (pair["name"], pair["prefill"], pair["usable"]) == ("decode-0/0 alone", "", True)
    dispatcher.add_group("prefill", await prefill.start())
    try:
        assert await dispatcher.wait_ready(20)
        assert text_of(await collect(dispatcher, asked(max_tokens=30))) == echo(30)
        assert prefill.received[-1].sampling.max_tokens == 30 and decode.leases[-1]
        await prefill.stop()
        await until(lambda: not any(group.ready for group in dispatcher.fleet.registry.groups() if group.role == "prefill"), "the loss")
        assert dispatcher.ready()
        assert (await collect(dispatcher, asked(max_tokens=30)))[-1].served_by == ("decode-0/0",)
    finally:
        await dispatcher.close()
        await prefill.stop()


async def test_a_load_that_says_nothing_new_wakes_nobody(make_dispatcher: MakeDispatcher) -> None:
    fleet = (await make_dispatcher(*nodes())).fleet
    pair = fleet.registry.pairs()[0]
    await until(lambda: pair.prefill.idle and pair.decode.idle, "the proof's last word")
    group = pair.decode
    for load, woken in ((replace(group.load, steps=99), False), (replace(group.load, running_sequences=1), True)):
        waiting = asyncio.create_task(fleet.changed(20))
        await asyncio.sleep(0)
        fleet.heard(fleet.link(group), Heard(load=load))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done() is woken
        waiting.cancel()


async def test_a_flush_reaches_all_groups_asked_for_and_adds_up(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    second = EchoNode("decode", "decode-0", group=1)
    dispatcher = await make_dispatcher(prefill, decode, second)
    await until(lambda: all(group.up for group in dispatcher.fleet.registry.groups()), "all nodes")
    prefill.cached_blocks, decode.cached_blocks, second.cached_blocks = 5, 7, 11
    assert await dispatcher.flush_cache("decode-0") == Flushed(groups=2, blocks=18)
    assert (prefill.cached_blocks, decode.cached_blocks, second.cached_blocks) == (5, 0, 0)
    assert await dispatcher.flush_cache() == Flushed(groups=3, blocks=5)
    with pytest.raises(NotFound, match="no node 'decode-9'; known are decode-0, prefill-0"):
        await dispatcher.flush_cache("decode-9")


async def test_two_nodes_of_one_name_are_both_flushed(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    namesake = EchoNode("decode", "decode-0")
    dispatcher = await make_dispatcher(prefill, decode, namesake)
    await until(lambda: all(group.up for group in dispatcher.fleet.registry.groups()), "all nodes")
    decode.cached_blocks, namesake.cached_blocks = 7, 11
    assert await dispatcher.flush_cache() == Flushed(groups=3, blocks=18)


async def test_a_node_that_dies_ends_the_flush_that_waits_for_it(make_dispatcher: MakeDispatcher) -> None:
    """At once and with the reason: no timer is waited for, and nothing of it stays behind."""
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    decode.faults.die_at_flush = True
    with pytest.raises(NodeLost, match="died on purpose") as caught:
        await dispatcher.flush_cache()
    assert caught.value.retryable
    assert not len(dispatcher.fleet.flushes)
    decode.faults.die_at_flush = False
    with pytest.raises(NodeLost, match="no stream"):
        await dispatcher.flush_cache("decode-0")
    assert await dispatcher.flush_cache() == Flushed(groups=1, blocks=0), "a node that is away is not asked among all"
    await until(dispatcher.ready, "the node to be back")
    assert (await dispatcher.flush_cache()).groups == 2


async def test_whoever_leaves_takes_only_its_own_flush_along(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    fleet, group = dispatcher.fleet, dispatcher.fleet.registry.pairs()[0].decode
    decode.faults.silent = True
    leaving, staying = (asyncio.create_task(dispatcher.flush_cache("decode-0")) for _ in range(2))
    await until(lambda: len(decode.flushes) == 2, "both commands")
    leaving.cancel()
    await asyncio.wait([leaving])
    fleet.heard(fleet.link(group), Heard(flushed=tuple((number, 3) for number in decode.flushes)))
    assert await staying == Flushed(groups=1, blocks=3)
    assert leaving.cancelled() and not len(fleet.flushes)


async def test_a_flush_that_is_not_answered_ends_by_its_deadline_or_with_the_router(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    fleet, group = dispatcher.fleet, dispatcher.fleet.registry.pairs()[0].decode
    decode.faults.silent = True
    with pytest.raises(DeadlineExceeded, match=r"within 0.05 s from decode-0/0"):
        await fleet.flush_cache([group], 0.05)
    assert not len(fleet.flushes)
    fleet.heard(fleet.link(group), Heard(flushed=((decode.flushes[-1], 3),)))  # too late: dropped
    waiting = asyncio.create_task(dispatcher.flush_cache())
    await until(lambda: len(decode.flushes) == 2, "the command")
    dispatcher.shut()
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting
    assert not len(fleet.flushes)
