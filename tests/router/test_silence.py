"""Groups that fall silent, break or never speak, over real streams: who is suspect, who is dead, what becomes of their sequences."""

from __future__ import annotations

import asyncio
import socket

import pytest

from baton.deadline import now_s
from baton.errors import NodeLost, Unavailable
from router.dispatch import Dispatcher
from router.group import Group, Pair
from router.membership import GroupState
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode
from tests.router.test_dispatch import asked, collect, echo, nodes, text_of, until

BEAT_S = 0.05
DEAD_BEATS = 16


def group_of(dispatcher: Dispatcher, node: EchoNode) -> Group:
    group = dispatcher.fleet.registry.get(node.address)
    assert group is not None
    return group


def pairs_of(dispatcher: Dispatcher, node: EchoNode) -> list[Pair]:
    return [pair for pair in dispatcher.fleet.registry.pairs() if group_of(dispatcher, node) in pair.groups]


async def all_proven(dispatcher: Dispatcher) -> None:
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "all proofs")


async def test_a_silent_group_is_suspect_then_dead_and_back_with_its_next_hello(make_dispatcher: MakeDispatcher) -> None:
    """Like a stopped process: its streams stay open. It is condemned once, and proven again when it speaks, though in the same life."""
    prefill, decode = nodes(beat_s=BEAT_S)
    dispatcher = await make_dispatcher(prefill, decode, beat_s=BEAT_S, dead_beats=DEAD_BEATS)
    await all_proven(dispatcher)
    group, proofs = group_of(dispatcher, decode), len(decode.received)
    decode.faults.mute = True
    await until(lambda: group.state is GroupState.SUSPECT, "suspicion")
    assert not dispatcher.ready() and group.up
    await until(lambda: group.state is GroupState.DEAD, "the verdict")
    assert "decode-0/0 has said nothing for 0.8 s" in dispatcher.fleet.registry.summary()
    (notice,) = await dispatcher.notices.take(20)
    assert (notice.kind, notice.node, notice.address) == ("condemn", "decode-0", decode.address)
    for _ in range(3):
        dispatcher.fleet.sweep(now_s())
    assert not len(dispatcher.notices), "one verdict per silence"
    decode.faults.mute = False
    await until(dispatcher.ready, "the proof")
    assert len(decode.received) > proofs, "it was not trusted at its word"
    assert text_of(await collect(dispatcher, asked(max_tokens=20))) == echo(20)
    decode.faults.mute = True
    assert [notice.kind for notice in await dispatcher.notices.take(20)] == ["condemn"], "another silence, another verdict"


async def test_a_suspect_that_speaks_again_was_never_dead(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(beat_s=BEAT_S)
    dispatcher = await make_dispatcher(prefill, decode, beat_s=BEAT_S, dead_beats=40)
    group = group_of(dispatcher, decode)
    decode.faults.mute = True
    await until(lambda: group.state is GroupState.SUSPECT, "suspicion")
    (session,) = decode.sessions
    waiting = asyncio.create_task(collect(dispatcher, asked(max_tokens=20)))
    decode.faults.mute = False
    assert text_of(await waiting) == echo(20)
    assert decode.sessions == [session] and not len(dispatcher.notices)


async def test_what_ran_on_a_silent_group_goes_on_elsewhere(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(2, beat_s=BEAT_S, step_s=0.01)
    dispatcher = await make_dispatcher(prefill, first, second, beat_s=BEAT_S, dead_beats=DEAD_BEATS)
    await all_proven(dispatcher)
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=80)))
    await until(lambda: first.num_speaking + second.num_speaking == 1, "decode to run")
    (first if first.num_active else second).faults.mute = True
    chunks = await running
    assert text_of(chunks) == echo(80)
    assert set(chunks[-1].served_by) >= {"decode-0/0", "decode-1/0"}


async def test_a_stream_that_breaks_and_comes_back_is_no_death(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(beat_s=BEAT_S)
    dispatcher = await make_dispatcher(prefill, decode, beat_s=BEAT_S, dead_beats=200)
    await all_proven(dispatcher)
    group, proofs = group_of(dispatcher, decode), len(decode.received)
    decode.faults.die_at = 10
    assert text_of(await collect(dispatcher, asked(max_tokens=30))) == echo(30)
    assert group.ready and not group.why
    assert not len(dispatcher.notices)
    assert sum(request.request_id.startswith("proof-") for request in decode.received[proofs:]) == 0


async def test_a_group_that_went_away_is_dead_after_a_while_and_another_life_of_it_is_proven(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(beat_s=BEAT_S)
    dispatcher = await make_dispatcher(prefill, decode, beat_s=BEAT_S, dead_beats=DEAD_BEATS)
    await all_proven(dispatcher)
    group, port = group_of(dispatcher, decode), int(decode.address.rpartition(":")[2])
    await decode.stop()
    await until(lambda: group.state is GroupState.GONE, "the break")
    assert [notice.node for notice in await dispatcher.notices.take(20)] == ["decode-0"]
    assert group.state is GroupState.DEAD and "has said nothing for 0.8 s: " in group.why
    with pytest.raises(NodeLost, match="no stream"):
        dispatcher.fleet.link(group).check("anything", 1)
    reborn = EchoNode("decode", "decode-0", beat_s=BEAT_S)
    await reborn.start(port)
    try:
        await until(dispatcher.ready, "a new proof")
        assert reborn.received[0].request_id.startswith("proof-")
    finally:
        await dispatcher.close()
        await reborn.stop()


async def test_a_group_that_never_says_hello_is_condemned_under_its_address(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes(beat_s=BEAT_S), beat_s=BEAT_S, dead_beats=DEAD_BEATS)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and never reads
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        dispatcher.add_group("decode", address)
        (notice,) = await dispatcher.notices.take(20)
        assert (notice.node, notice.address) == (address, address)
        assert dispatcher.ready(), "the others are none the worse"


async def test_a_router_that_was_stopped_condemns_nobody(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes())
    dispatcher.fleet.sweep(now_s() + 3600.0)
    assert dispatcher.ready() and not len(dispatcher.notices)


async def test_a_node_is_condemned_as_a_whole(make_dispatcher: MakeDispatcher) -> None:
    """The groups of a node may step in one another's time: what runs on the siblings of a dead one goes on elsewhere, too."""
    first, second = (EchoNode("decode", "decode-0", group=number, beat_s=BEAT_S, step_s=0.01) for number in range(2))
    other = EchoNode("decode", "decode-1", beat_s=BEAT_S, step_s=0.01)
    dispatcher = await make_dispatcher(
        EchoNode("prefill", "prefill-0", beat_s=BEAT_S), first, second, other, beat_s=BEAT_S, dead_beats=DEAD_BEATS
    )
    await all_proven(dispatcher)
    running = [asyncio.create_task(collect(dispatcher, asked(max_tokens=100))) for _ in range(3)]
    await until(lambda: first.num_active and second.num_active and other.num_active, "a sequence on each")
    second.faults.mute = first.faults.quiet = True
    assert [text_of(await answer) for answer in running] == [echo(100)] * 3
    assert [notice.node for notice in await dispatcher.notices.take(20)] == ["decode-0"]
    assert not group_of(dispatcher, first).ready
    await until(lambda: not first.num_active, "the cancels")


async def test_a_refused_node_that_dies_is_not_refused_any_more(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = EchoNode("prefill", "prefill-0", beat_s=BEAT_S), EchoNode("decode", "decode-0", protocol_version=1)
    dispatcher = await make_dispatcher(prefill, decode, wait=False, beat_s=BEAT_S, dead_beats=DEAD_BEATS)
    group = group_of(dispatcher, decode)
    await until(lambda: group.refusal, "the refusal")
    await asyncio.sleep(BEAT_S * DEAD_BEATS)
    assert group.refusal, "as long as it says so"
    await decode.stop()
    await until(lambda: group.state is GroupState.DEAD, "the verdict")
    assert not group.refusal
    dispatcher.fleet.registry.check_possible()


async def test_with_the_last_decode_node_gone_a_stream_that_ends_names_it(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode)
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=4000)))
    await until(lambda: decode.num_active == 1, "decode to run")
    await decode.stop()
    await until(lambda: not dispatcher.ready(), "the loss to be seen")
    dispatcher.shut()
    with pytest.raises(Unavailable, match=r"shutting down; .*0 of 1 decode.*decode-0") as caught:
        await running
    assert caught.value.cause == "shutting_down"
