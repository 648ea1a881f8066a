"""When a sequence is given up before its deadline: for what it does to nodes, for bugs, and because the router goes."""

from __future__ import annotations

import asyncio
import time

import pytest

from baton.deadline import Deadline
from baton.errors import DeadlineExceeded, NodeLost, Unavailable
from baton.request import Sampling
from router.dispatch import Dispatcher
from router.failures import MAX_LOSSES
from router.life import Delivery, SequenceLife
from router.relay import Relay
from tests.router.conftest import MakeDispatcher
from tests.router.test_relay import PROMPT, asked, check, collect, nodes, proven, retries


def life(dispatcher: Dispatcher, name: str) -> SequenceLife:
    return SequenceLife(name, dispatcher.tokenizer.encode(PROMPT), Sampling(max_tokens=30))


def ignore(delivery: Delivery) -> None:
    """Nobody reads it."""


@pytest.mark.parametrize("deadly", [["decode"], ["prefill", "decode"]])
async def test_a_request_that_no_node_survives_is_given_up(make_dispatcher: MakeDispatcher, deadly: list[str]) -> None:
    """Prefill makes a token in every attempt, which is no progress as long as decode makes none."""
    made = nodes()
    dispatcher = await proven(make_dispatcher, *made)
    for node in made:
        node.faults.deadly = node.role in deadly
    with pytest.raises(NodeLost, match=f"{MAX_LOSSES} nodes in a row") as caught:
        await collect(dispatcher, asked(30))
    assert (caught.value.cause, caught.value.retryable) == ("node_losses", False)
    assert retries(dispatcher, "node_lost") == MAX_LOSSES - 1
    for node in made:
        node.faults.deadly = False
    check(await collect(dispatcher, asked(30)), 30)


async def test_losses_with_progress_between_them_are_not_held_against_a_request(make_dispatcher: MakeDispatcher) -> None:
    _, decode = made = nodes(step_s=0.01)
    dispatcher = await proven(make_dispatcher, *made)
    chunks = []
    async for chunk in dispatcher.generate(asked(80)):
        chunks.append(chunk)
        if decode.faults.die_at is None:
            decode.faults.die_at = len(chunks) + 5
    check(chunks, 80)
    assert retries(dispatcher, "node_lost") > MAX_LOSSES


# The router goes.


async def test_a_router_that_goes_as_a_deadline_passes_ends_everyone_all_the_same(make_dispatcher: MakeDispatcher) -> None:
    """Both timers fire in one turn of the loop, before the relay can act on the first."""
    _, decode = made = nodes()
    dispatcher = await proven(make_dispatcher, *made)
    decode.faults.quiet = True
    deadline, gone = Deadline.after(0.2), Unavailable("the router goes", cause="shutting_down")
    carried = [
        Relay(dispatcher.fleet, life(dispatcher, name), Deadline.after(at_s), ignore) for name, at_s in (("late", 0.2), ("long", 30))
    ]
    running = [asyncio.create_task(relay.run()) for relay in carried]
    shut = asyncio.get_running_loop().create_future()

    def abandon() -> None:
        dispatcher.fleet.abandon_all(gone)
        shut.set_result(None)

    asyncio.get_running_loop().call_at(deadline.at_s + 0.05, abandon)
    await asyncio.sleep(0.1)
    time.sleep(0.4)  # noqa: ASYNC251 - the loop is late, as when the process was stopped
    await asyncio.wait_for(shut, 20)
    with pytest.raises(DeadlineExceeded):
        await running[0]
    with pytest.raises(Unavailable, match="the router goes"):
        await running[1]


async def test_a_sequence_that_starts_as_the_router_goes_ends_at_once(make_dispatcher: MakeDispatcher) -> None:
    _, decode = made = nodes()
    dispatcher = await proven(make_dispatcher, *made)
    before = len(decode.received)
    dispatcher.fleet.abandon_all(Unavailable("the router goes", cause="shutting_down"))
    with pytest.raises(Unavailable, match="the router goes"):
        await Relay(dispatcher.fleet, life(dispatcher, "new"), Deadline.after(30), ignore).run()
    assert len(decode.received) == before
    assert not dispatcher.fleet.num_carriers
