"""Draining, retiring, restoring and winding down over real streams: nothing new arrives, nothing that runs is lost."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import NotFound, Unavailable
from router.dispatch import Dispatcher
from router.membership import GroupState, NodeReport
from router.upkeep import Drained
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode
from tests.router.test_dispatch import asked, collect, echo, nodes, text_of, until


async def two_decode_nodes(make_dispatcher: MakeDispatcher) -> tuple[Dispatcher, list[EchoNode]]:
    all_nodes = nodes(2, step_s=0.01)
    dispatcher = await make_dispatcher(*all_nodes)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "all proofs")
    return dispatcher, all_nodes


async def test_what_does_not_end_in_time_is_handed_over(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, (_, first, second) = await two_decode_nodes(make_dispatcher)
    running = [asyncio.create_task(collect(dispatcher, asked(max_tokens=100))) for _ in range(4)]
    await until(lambda: first.num_speaking == second.num_speaking == 2, "two sequences on each")
    assert await dispatcher.drain("decode-0", 0.0) == Drained(idle=True, handed_over=2)
    assert first.num_active == 0
    answers = [await answer for answer in running]
    assert [text_of(chunks) for chunks in answers] == [echo(100)] * 4
    assert sum(set(chunks[-1].served_by) >= {"decode-0/0", "decode-1/0"} for chunks in answers) == 2
    before = len(first.received)
    assert text_of(await collect(dispatcher, asked(max_tokens=5))) == echo(5)
    assert len(first.received) == before


async def test_without_an_elsewhere_nothing_is_handed_over(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, (_, first, second) = await two_decode_nodes(make_dispatcher)
    await second.stop()
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=100)))
    await until(lambda: first.num_active == 1, "the request to run")
    assert await dispatcher.drain("decode-0", 0.0) == Drained(idle=False)
    assert text_of(await running) == echo(100)
    assert await dispatcher.drain("decode-0", 20) == Drained(idle=True)


async def test_prompts_of_a_drained_prefill_node_are_computed_elsewhere(make_dispatcher: MakeDispatcher) -> None:
    first, second = (EchoNode("prefill", f"prefill-{number}") for number in range(2))
    dispatcher = await make_dispatcher(first, second, EchoNode("decode", "decode-0"))
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "all proofs")
    first.faults.quiet = True
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=1)))
    await until(lambda: first.num_active == 1, "the prompt to wait")
    assert await dispatcher.drain("prefill-0", 0.0) == Drained(idle=True, handed_over=1)
    assert text_of(await running) == echo(1)


async def test_a_retired_node_is_let_go_once_it_is_idle_and_may_come_back(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, (_, first, _) = await two_decode_nodes(make_dispatcher)
    assert await dispatcher.drain("decode-0", 20) == Drained(idle=True)
    assert await dispatcher.notices.take(0.01) == (), "draining alone ends no process"
    assert await dispatcher.drain("decode-0", 20, retire=True) == Drained(idle=True)
    (notice,) = await dispatcher.notices.take(20)
    assert (notice.kind, notice.node, notice.address) == ("retire", "decode-0", first.address)
    await dispatcher.drain("decode-0", 20, retire=True)
    dispatcher.restore("decode-0")
    assert [notice.kind for notice in await dispatcher.notices.take(20)] == ["restore"], "what was asked last"
    before = len(first.received)
    await asyncio.gather(*(collect(dispatcher, asked(max_tokens=20)) for _ in range(8)))
    assert len(first.received) > before


async def test_a_node_that_is_restored_meanwhile_is_neither_left_nor_retired(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, (_, first, second) = await two_decode_nodes(make_dispatcher)
    running = [asyncio.create_task(collect(dispatcher, asked(max_tokens=100))) for _ in range(2)]
    await until(lambda: first.num_speaking == second.num_speaking == 1, "one sequence on each")
    draining = asyncio.create_task(dispatcher.drain("decode-0", 20, retire=True))
    await asyncio.sleep(0)
    dispatcher.restore("decode-0")
    assert await draining == Drained(idle=False), "at once: nobody wants it any more"
    assert first.num_active == 1
    assert [text_of(await answer) for answer in running] == [echo(100)] * 2
    assert [notice.kind for notice in await dispatcher.notices.take(20)] == ["restore"]


async def test_a_node_that_is_rebuilt_while_it_drains_is_retired_in_its_new_life(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, (_, first, second) = await two_decode_nodes(make_dispatcher)
    running = [asyncio.create_task(collect(dispatcher, asked(max_tokens=60))) for _ in range(2)]
    await until(lambda: first.num_speaking == second.num_speaking == 1, "one sequence on each")
    draining = asyncio.create_task(dispatcher.drain("decode-0", 20, retire=True))
    await asyncio.sleep(0)
    reborn = EchoNode("decode", "decode-0")
    try:
        address = await reborn.start()
        dispatcher.add_group("decode", address)
        await until(lambda: len(dispatcher.fleet.registry.of("decode-0")) == 2, "its new life")
        await dispatcher.remove_group(first.address)
        assert await draining == Drained(idle=True)
        (notice,) = await dispatcher.notices.take(20)
        assert (notice.kind, notice.address) == ("retire", address)
        assert [text_of(await answer) for answer in running] == [echo(60)] * 2
    finally:
        await dispatcher.close()
        await reborn.stop()


async def test_a_node_that_is_only_reported_can_be_retired_and_restored(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, _ = await two_decode_nodes(make_dispatcher)
    dispatcher.report_node(NodeReport("decode-2", "decode", "waiting", "rank 0 died", lives=2))
    assert await dispatcher.drain("decode-2", 20, retire=True) == Drained(idle=True)
    assert [(notice.kind, notice.node) for notice in await dispatcher.notices.take(20)] == [("retire", "decode-2")]
    reborn = EchoNode("decode", "decode-2")
    try:
        address = await reborn.start()
        dispatcher.add_group("decode", address)
        group = dispatcher.fleet.registry.get(address)
        assert group is not None
        await until(lambda: group.state is GroupState.DRAINING, "the wish to outlive the rebuilding")
        dispatcher.restore("decode-2")
        assert group.ready
    finally:
        await dispatcher.close()
        await reborn.stop()


async def test_an_unknown_node_is_not_found(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, _ = await two_decode_nodes(make_dispatcher)
    dispatcher.report_node(NodeReport("decode-2", "decode", "placing"))
    with pytest.raises(NotFound, match=r"'decode-7'; known are decode-0, decode-1, decode-2, prefill-0"):
        await dispatcher.drain("decode-7", 0.0)
    with pytest.raises(NotFound, match="decode-7"):
        dispatcher.restore("decode-7")


async def test_winding_down_lets_requests_finish_and_takes_no_new_ones(make_dispatcher: MakeDispatcher) -> None:
    """Running ones and one that waits in the queue: all had been taken."""
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode, max_running=1)
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=60)))
    await until(lambda: decode.num_active == 1, "the request to run")
    queued = asyncio.create_task(collect(dispatcher, asked(max_tokens=5)))
    await until(lambda: dispatcher.status()["requests_queued"] == 1, "the other to wait")
    down = asyncio.create_task(dispatcher.wind_down(20))
    await until(lambda: not dispatcher.ready(), "health to say so")
    assert "shutting down" in str(dispatcher.status()["summary"])
    with pytest.raises(Unavailable, match="shutting down") as caught:
        await collect(dispatcher, asked(max_tokens=5))
    assert (caught.value.cause, caught.value.retryable) == ("shutting_down", True)
    assert text_of(await running) == echo(60)
    assert text_of(await queued) == echo(5)
    await down


async def test_winding_down_ends_after_its_time_or_when_it_is_cut_short(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode)
    running = [asyncio.create_task(collect(dispatcher, asked(max_tokens=4000))) for _ in range(2)]
    await until(lambda: decode.num_active == 2, "the requests to run")
    down = asyncio.create_task(dispatcher.wind_down(100))
    await until(lambda: not dispatcher.ready(), "it to begin")
    await dispatcher.wind_down(0.05)
    await down
    for request in running:
        with pytest.raises(Unavailable, match="shutting down"):
            await request


async def test_a_broken_node_is_counted_once_and_so_is_its_return(make_dispatcher: MakeDispatcher) -> None:
    dispatcher, _ = await two_decode_nodes(make_dispatcher)
    for stage in ("serving", "broken", "waiting", "broken", "placing", "loading", "serving", "serving"):
        dispatcher.report_node(NodeReport("decode-1", "decode", stage, "rank 0 died", lives=2))
    told = dispatcher.metrics().decode()
    assert 'baton_node_deaths_total{node="decode-1"} 1.0' in told
    assert 'baton_node_away_seconds_count{node="decode-1"} 1.0' in told
