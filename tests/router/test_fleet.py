"""What passes between router and nodes beside a request's own words: cancels that got lost, loads that say nothing new."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import DeadlineExceeded, NodeLost, NotFound, Unavailable
from baton.request import Sampling, SequenceRequest
from router.flush import Flushed
from router.heard import Heard
from router.nodes import MAX_QUEUED_COMMANDS
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode
from tests.router.test_dispatch import nodes, until


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
