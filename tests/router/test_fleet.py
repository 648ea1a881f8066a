"""What passes between router and nodes beside a request's own words: cancels that got lost, loads that say nothing new."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from baton.request import Sampling, SequenceRequest
from router.heard import Heard
from router.nodes import MAX_QUEUED_COMMANDS
from tests.router.conftest import MakeDispatcher
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
