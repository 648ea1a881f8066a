"""A sequence goes on whatever is lost or leaves: words on their way, one node, all of a kind, all of them. Over real gRPC, on echo nodes.

The clients' side is checked everywhere: every token once, in order, and one end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from baton.deadline import Deadline
from baton.errors import (
    BatonError,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    NodeLost,
    ResourceExhausted,
    Unavailable,
)
from baton.request import Chunk, GenerateRequest, Prompt, Sampling, SamplingAsked, SequenceRequest
from router.dispatch import Dispatcher
from router.failures import MAX_BUGS
from router.group import Group, Pair
from router.life import Delivery, SequenceLife
from router.relay import Relay
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode

PROMPT = "the quick brown fox"
BEAT_S = 0.05
# What makes no progress is asked for after 0.2 s; nobody is dead because this machine is busy.
QUICK = {"beat_s": BEAT_S, "suspect_beats": 4, "dead_beats": 400}


def asked(num_tokens: int, timeout_s: float = 30.0) -> GenerateRequest:
    sampling = SamplingAsked(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
    return GenerateRequest(Prompt(text=PROMPT), sampling, timeout_s=timeout_s)


def echo(num_tokens: int) -> str:
    return (PROMPT * (num_tokens // len(PROMPT) + 1))[:num_tokens]


async def collect(dispatcher: Dispatcher, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in dispatcher.generate(request)]


async def rest(stream: AsyncGenerator[Chunk, None]) -> list[Chunk]:
    async with aclosing(stream):
        return [chunk async for chunk in stream]


def check(chunks: list[Chunk], num_tokens: int) -> None:
    """Every token once and in order, with its logprob, and one end that counts them."""
    assert "".join(chunk.text for chunk in chunks) == echo(num_tokens)
    assert [item.token_id for chunk in chunks for item in chunk.logprobs] == [i for chunk in chunks for i in chunk.token_ids]
    assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(PROMPT), num_tokens)


def nodes(num_prefill: int = 1, num_decode: int = 1, step_s: float = 0.0) -> list[EchoNode]:
    kinds = [("prefill", i) for i in range(num_prefill)] + [("decode", i) for i in range(num_decode)]
    return [EchoNode(role, f"{role}-{i}", step_s=step_s, beat_s=BEAT_S) for role, i in kinds]


def asked_by_clients(node: EchoNode) -> list[SequenceRequest]:
    return [request for request in node.received if not request.request_id.startswith("proof-")]


def client_leases(node: EchoNode) -> list[int]:
    heard = zip(node.received, node.leases, strict=True)
    return [lease for request, lease in heard if not request.request_id.startswith("proof-")]


def retries(dispatcher: Dispatcher, cause: str) -> float:
    name = f'baton_retries_total{{cause="{cause}"}}'
    lines = dispatcher.metrics().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def group(dispatcher: Dispatcher, node: EchoNode) -> Group:
    found = dispatcher.fleet.registry.get(node.address)
    assert found is not None
    return found


def all_proven(dispatcher: Dispatcher) -> bool:
    return all(pair.usable for pair in dispatcher.fleet.registry.pairs())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what nodes have noticed has no event here
            await asyncio.sleep(0.01)


async def proven(make_dispatcher: MakeDispatcher, *made: EchoNode, **router: object) -> Dispatcher:
    """A dispatcher that has run its proofs, so that no fault hits one of them."""
    dispatcher = await make_dispatcher(*made, **QUICK, **router)
    await until(lambda: all_proven(dispatcher))
    return dispatcher


async def reborn(node: EchoNode) -> EchoNode:
    """Another life of a node that was stopped, at its address."""
    again = EchoNode(node.role, node.name, step_s=node.step_s, beat_s=node.beat_s)
    await again.start(int(node.address.rpartition(":")[2]))
    return again


@asynccontextmanager
async def ended(*started: EchoNode) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for node in started:
            await node.stop()


# What gets lost on its way is found by asking.


@pytest.mark.parametrize("lost_at", [1, 5, 28])
async def test_a_token_that_never_came_is_missed_while_others_still_do(make_dispatcher: MakeDispatcher, lost_at: int) -> None:
    _, decode = made = nodes(step_s=0.01)
    dispatcher = await proven(make_dispatcher, *made)
    decode.faults.lose_at = lost_at
    check(await collect(dispatcher, asked(60)), 60)
    assert retries(dispatcher, "lost_tokens") == 1
    assert len(asked_by_clients(decode)[-1].emitted_ids) == lost_at


async def test_an_end_that_never_came_is_missed_because_the_attempt_is_unknown(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.lose_at = 29
    check(await collect(dispatcher, asked(30)), 30)
    assert retries(dispatcher, "unknown_attempt") == 1
    assert client_leases(prefill)[-1] == 0, "one token was left, which prefill makes by itself"


async def test_a_first_token_that_never_came_is_repeated_by_decode(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    prefill.faults.lose_at = 0
    check(await collect(dispatcher, asked(30)), 30)
    assert len(asked_by_clients(prefill)) == len(asked_by_clients(decode)) == 1


async def test_a_request_that_never_reached_decode_is_sent_to_it_again(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.forget = True
    running = asyncio.create_task(collect(dispatcher, asked(30)))
    await until(lambda: decode.received and asked_by_clients(decode))
    decode.faults.forget = False
    check(await running, 30)
    assert len(asked_by_clients(prefill)) == 1, "the lease is as good as before"
    assert retries(dispatcher, "unknown_attempt") == 1


async def test_a_request_that_never_reached_prefill_is_sent_again(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    # What decode makes waits for prefill in real nodes; echo nodes do not, so both are told and neither says a word.
    prefill.faults.forget = decode.faults.quiet = True
    running = asyncio.create_task(collect(dispatcher, asked(30)))
    await until(lambda: prefill.checked)
    prefill.faults.forget = decode.faults.quiet = False
    check(await running, 30)
    assert len(asked_by_clients(prefill)) == 2


async def test_prefill_hears_again_that_decode_has_room(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.quiet = prefill.faults.lose_accepted = True
    running = asyncio.create_task(collect(dispatcher, asked(1 + 1)))
    await until(lambda: not prefill.faults.lose_accepted and not prefill.num_active)
    decode.faults.quiet = False
    check(await running, 2)
    assert len(asked_by_clients(prefill)) == 1, "it waited, and then went on"


async def test_who_is_slow_but_there_is_left_alone(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.quiet = True
    running = asyncio.create_task(collect(dispatcher, asked(30)))
    await until(lambda: len(decode.checked) >= 3)
    decode.faults.quiet = False
    check(await running, 30)
    assert len(asked_by_clients(decode)) == 1


# Somebody leaves.


async def test_without_prefill_decode_computes_prompts_itself_until_prefill_is_back(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    await prefill.stop()
    await until(lambda: not group(dispatcher, prefill).up)
    chunks = await collect(dispatcher, asked(30))
    check(chunks, 30)
    assert (client_leases(decode)[-1], chunks[-1].served_by) == (0, ("decode-0/0",))
    check(await collect(dispatcher, asked(1)), 1)
    again = await reborn(prefill)
    async with ended(again):
        await until(dispatcher.fleet.registry.complete)
        check(await collect(dispatcher, asked(30)), 30)
        assert len(asked_by_clients(again)) == 1
        assert client_leases(decode)[-1] != 0


async def test_a_prefill_node_that_is_there_keeps_decode_from_being_alone(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode, no_node_s=0.2)
    decode.faults.quiet = True
    prefill.faults.refuse = ResourceExhausted("1024 prompts wait", stage="prefill", node="prefill-0")
    with pytest.raises(ResourceExhausted, match="1024"):
        await collect(dispatcher, asked(30))


async def test_a_stream_goes_on_alone_when_the_last_prefill_node_and_then_decode_break(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await proven(make_dispatcher, prefill, decode)
    running = asyncio.create_task(collect(dispatcher, asked(80)))
    await until(lambda: decode.num_active)
    await prefill.stop()
    await until(lambda: not group(dispatcher, prefill).up)
    decode.faults.die_at = 40
    chunks = await running
    check(chunks, 80)
    assert client_leases(decode)[-1] == 0
    assert len(asked_by_clients(decode)[-1].emitted_ids) == 40


async def test_a_stream_goes_on_when_all_nodes_were_gone_and_are_back(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await proven(make_dispatcher, prefill, decode, no_node_s=0.1)
    stream = dispatcher.generate(asked(60))
    begun = [await anext(stream) for _ in range(3)]
    running = asyncio.create_task(rest(stream))
    await decode.stop()
    await prefill.stop()
    await until(lambda: not group(dispatcher, prefill).up and not group(dispatcher, decode).up)
    with pytest.raises(Unavailable):
        await collect(dispatcher, asked(4))
    assert not running.done(), "what was under way waits for longer than what is new"
    again = [await reborn(prefill), await reborn(decode)]
    async with ended(*again):
        check(begun + await running, 60)
        assert asked_by_clients(again[1])[0].emitted_ids


async def test_a_new_request_waits_for_nodes_and_then_hears_what_is_missing(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode, no_node_s=0.2)
    await decode.stop()
    await until(lambda: not group(dispatcher, decode).up)
    with pytest.raises(Unavailable, match="1 of 1 prefill nodes and 0 of 1 decode groups are ready") as caught:
        await collect(dispatcher, asked(4))
    assert (caught.value.cause, caught.value.http_status, caught.value.retryable) == ("no_nodes", 503, True)
    assert caught.value.retry_after_s
    assert caught.value.retry_after_s > 0


async def test_a_new_request_is_served_by_a_node_that_comes_back_meanwhile(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    await decode.stop()
    await until(lambda: not group(dispatcher, decode).up)
    waiting = asyncio.create_task(collect(dispatcher, asked(4)))
    again = await reborn(decode)
    async with ended(again):
        check(await waiting, 4)


async def test_a_deadline_that_passes_while_nodes_are_away_says_so(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await proven(make_dispatcher, prefill, decode)
    running = asyncio.create_task(collect(dispatcher, asked(3000, timeout_s=1.0)))
    await until(lambda: decode.num_active)
    await decode.stop()
    with pytest.raises(DeadlineExceeded, match=r"of at most 3000 tokens.*0 of 1 decode groups"):
        await running


async def test_a_group_is_left_for_another_when_it_is_handed_over(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(num_decode=2, step_s=0.01)
    dispatcher = await proven(make_dispatcher, prefill, first, second)
    running = asyncio.create_task(collect(dispatcher, asked(80)))
    await until(lambda: first.num_active or second.num_active)
    left, other = (first, second) if first.num_active else (second, first)
    assert dispatcher.fleet.hand_over([group(dispatcher, other)]) == 0
    assert dispatcher.fleet.hand_over([group(dispatcher, left)]) == 1
    assert dispatcher.fleet.hand_over([group(dispatcher, left)]) == 0, "it has left already"
    check(await running, 80)
    assert not left.num_active
    assert asked_by_clients(other)
    assert retries(dispatcher, "handed_over") == 1


async def test_what_decode_has_heard_needs_no_prefill_any_more(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await proven(make_dispatcher, prefill, decode)
    async with aclosing(dispatcher.generate(asked(40))) as chunks:
        got = [await anext(chunks), await anext(chunks), await anext(chunks)]
        assert dispatcher.fleet.hand_over([group(dispatcher, prefill)]) == 0
        got += [chunk async for chunk in chunks]
    check(got, 40)
    await until(lambda: prefill.cancelled)
    assert len(asked_by_clients(prefill)) == 1


# Which errors are worth another attempt.


@pytest.mark.parametrize(
    "error",
    [
        NodeLost("rank 1 died", stage="decode"),
        DeadlineExceeded("30 s for one read", stage="pull"),
        NodeLost("no answer", stage="pull", cause="handshake"),
        Incompatible("another block size", stage="pull"),
        InvalidRequest("a block is outside of the pool", stage="pull"),
        InternalError("a step failed", stage="decode"),
        ResourceExhausted("suspended: all blocks are in use", stage="decode", cause="suspended"),
    ],
)
@pytest.mark.parametrize("index", [0, 7])
async def test_a_failure_of_one_node_is_made_good_by_another(make_dispatcher: MakeDispatcher, error: BatonError, index: int) -> None:
    prefill, first, second = nodes(num_decode=2)
    dispatcher = await proven(make_dispatcher, prefill, first, second)
    first.faults.fail_at = (index, error)
    second.faults.fail_at = (index, error)
    check(await collect(dispatcher, asked(30)), 30)
    assert retries(dispatcher, error.cause) >= 1


async def test_a_suspended_sequence_is_resumed_where_it_is_the_only_way(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.fail_at = (0, ResourceExhausted("suspended", stage="decode", cause="suspended"))
    check(await collect(dispatcher, asked(30)), 30)


async def test_a_group_that_goes_on_from_another_token_is_left(make_dispatcher: MakeDispatcher) -> None:
    """Its first token must be the one that the client has from prefill: what it makes next continues that."""
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.quiet, decode.faults.lie_at = True, 0
    running = asyncio.create_task(collect(dispatcher, asked(30)))
    await until(lambda: prefill.checked)
    decode.faults.quiet = False
    check(await running, 30)
    assert retries(dispatcher, "protocol") == 1


async def test_a_sequence_is_not_refused_once_its_client_has_had_a_token_of_another(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    prefill.faults.quiet = True
    decode.faults.refuse = ResourceExhausted("0 of 64 blocks", stage="decode")
    delivered: list[Delivery] = []
    life = SequenceLife("second", dispatcher.tokenizer.encode(PROMPT), Sampling(max_tokens=30))
    carried = Relay(dispatcher.fleet, life, Deadline.after(30), delivered.append, answered=lambda: True)
    running = asyncio.create_task(carried.run())
    await until(lambda: retries(dispatcher, "resource_exhausted") >= 2)
    prefill.faults.quiet, decode.faults.refuse = False, None
    await running
    assert [i for delivery in delivered for i in delivery.token_ids] == list(dispatcher.tokenizer.encode(echo(30)))


async def test_a_bug_that_a_request_meets_everywhere_ends_it(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.quiet = True
    prefill.faults.refuse = InternalError("a step failed: index out of range", stage="prefill", node="prefill-0")
    with pytest.raises(InternalError, match="index out of range"):
        await collect(dispatcher, asked(30))
    assert len(asked_by_clients(prefill)) == 1 + MAX_BUGS
    await until(lambda: not decode.num_active)


# Trust in pairs.


def pair_of(dispatcher: Dispatcher, prefill: EchoNode, decode: EchoNode) -> Pair:
    source, target = group(dispatcher, prefill), group(dispatcher, decode)
    return next(pair for pair in dispatcher.fleet.registry.pairs() if pair.prefill is source and pair.decode is target)


async def test_a_pair_whose_pull_failed_is_proven_again_while_others_serve(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(num_decode=2)
    dispatcher = await proven(make_dispatcher, prefill, first, second)
    doubted = pair_of(dispatcher, prefill, first)
    first.faults.refuse = NodeLost("prefill-0 does not answer", stage="pull", node="prefill-0", cause="handshake")
    check(await collect(dispatcher, asked(30)), 30)
    assert not doubted.proven
    assert "does not answer" in dispatcher.fleet.registry.summary()
    before = len(asked_by_clients(first))
    check(await collect(dispatcher, asked(30)), 30)
    assert len(asked_by_clients(first)) == before, "nobody is sent there meanwhile"
    first.faults.refuse = None
    await until(lambda: doubted.usable)


async def test_prefill_that_nobody_reaches_does_not_keep_decode_from_serving_alone(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.unreachable = True
    check(await collect(dispatcher, asked(30)), 30)
    check(await collect(dispatcher, asked(30)), 30)
    assert asked_by_clients(decode)[-1].attempt == 1, "there at once"
    assert not client_leases(decode)[-1]
    decode.faults.unreachable = False
    await until(dispatcher.fleet.registry.complete)
    check(await collect(dispatcher, asked(30)), 30)
    assert client_leases(decode)[-1]


async def test_a_deadline_of_a_client_says_nothing_about_a_pair(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await proven(make_dispatcher, prefill, decode)
    decode.faults.silent = True
    running = asyncio.create_task(collect(dispatcher, asked(30, timeout_s=0.5)))
    await until(lambda: asked_by_clients(decode))
    with pytest.raises(DeadlineExceeded):
        await running
    late = DeadlineExceeded("the source has announced nothing in time", stage="pull", node=prefill.address)
    decode.fail(asked_by_clients(decode)[0], late)
    beat = group(dispatcher, decode).load
    await until(lambda: group(dispatcher, decode).load is not beat)
    assert all(pair.proven for pair in dispatcher.fleet.registry.pairs())


async def test_two_routers_do_not_take_their_requests_for_one_anothers(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    first = await proven(make_dispatcher, prefill, decode)
    second = Dispatcher(first._config, first.tokenizer)
    second.start()
    try:
        for node in (prefill, decode):
            second.add_group(node.role, node.address)
        assert await second.wait_ready(20)
        named = GenerateRequest(Prompt(text=PROMPT), SamplingAsked(max_tokens=4), request_id="mine")
        await asyncio.gather(collect(first, named), collect(second, named))
    finally:
        await second.close()
    asked_ids = [request.request_id for request in decode.received]
    assert len(asked_ids) == len(set(asked_ids))


# Clients that do not read.


async def test_a_stream_left_unread_is_bounded_and_nobody_else_waits_for_it(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await proven(make_dispatcher, *nodes(), slow_client_s=0.5)
    async with aclosing(dispatcher.generate(asked(3000))) as unread:
        await anext(unread)
        check(await collect(dispatcher, asked(200)), 200)
        await until(lambda: dispatcher.num_running == 0)
    assert b'outcome="slow_client"' in dispatcher.metrics()
