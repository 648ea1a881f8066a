"""A request's whole life through a dispatcher and echo nodes: every way in which it can end, and where it goes on after faults."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from baton.request import Chunk, FinishReason, GenerateRequest, Prompt, SamplingAsked
from router.dispatch import Dispatcher
from tests.router.conftest import MakeDispatcher
from tests.router.echo_nodes import EchoNode

PROMPT = "the quick brown fox"
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def asked(text: str = PROMPT, *, n: int = 1, timeout_s: float | None = 20.0, **sampling: object) -> GenerateRequest:
    return GenerateRequest(Prompt(text=text), SamplingAsked(**{**GREEDY, **sampling}), n=n, timeout_s=timeout_s)


async def collect(dispatcher: Dispatcher, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in dispatcher.generate(request)]


def text_of(chunks: list[Chunk], choice: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.choice == choice)


def echo(num_tokens: int) -> str:
    return (PROMPT * (num_tokens // len(PROMPT) + 1))[:num_tokens]


def nodes(num_decode: int = 1, **settings: object) -> list[EchoNode]:
    decode = [EchoNode("decode", f"decode-{i}", **settings) for i in range(num_decode)]
    return [EchoNode("prefill", "prefill-0", **settings), *decode]


async def until(condition, what) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what other processes have noticed has no event here
            await asyncio.sleep(0.01)


async def test_tokens_come_in_order_and_the_last_chunk_says_all(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    chunks = await collect(dispatcher, asked(max_tokens=40))
    assert text_of(chunks) == echo(40)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [FinishReason.LENGTH]
    last = chunks[-1]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(PROMPT), 40)
    assert set(last.served_by) >= {"decode-0/0"}
    assert chunks[0].seed is not None and all(chunk.seed is None for chunk in chunks[1:])
    assert all(chunk.usage is None for chunk in chunks[:-1])
    await until(lambda: decode.num_active == prefill.num_active == 0, "nodes to be done")


async def test_one_token_never_reaches_decode(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    before = len(decode.received)
    chunks = await collect(dispatcher, asked(max_tokens=1))
    assert text_of(chunks) == PROMPT[0]
    assert chunks[-1].served_by == ("prefill-0",)
    assert len(decode.received) == before
    assert prefill.leases[-1] == 0


async def test_n_sequences_have_seeds_of_their_own(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    chunks = await collect(dispatcher, asked(n=3, max_tokens=8, seed=2**63 - 2))
    assert [text_of(chunks, choice) for choice in range(3)] == [echo(8)] * 3
    seeds = {chunk.choice: chunk.seed for chunk in chunks if chunk.seed is not None}
    assert seeds == {0: 2**63 - 2, 1: 2**63 - 1, 2: 2**63}
    assert sum(chunk.usage is not None for chunk in chunks) == 1
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == len(PROMPT)


async def test_a_stop_string_across_tokens_ends_the_answer_and_the_nodes(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode)
    chunks = await collect(dispatcher, asked(max_tokens=3000, stop=("quick b", "zzz")))
    assert text_of(chunks) == "the "
    last = chunks[-1]
    assert (last.finish_reason, last.stopped_by) == (FinishReason.STOP, "quick b")
    assert last.usage.completion_tokens == len("the quick b")
    assert sum(len(chunk.token_ids) for chunk in chunks) == len("the quick b")
    await until(lambda: decode.num_active == 0, "decode to stop")
    assert decode.cancelled and prefill.cancelled


async def test_min_tokens_hides_early_stop_strings(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes())
    chunks = await collect(dispatcher, asked(max_tokens=60, min_tokens=15, stop=("quick",)))
    assert text_of(chunks) == PROMPT + "the "


async def test_a_stop_id_is_counted_but_not_shown(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes())
    stop_id = dispatcher.tokenizer.encode("q")[0]
    chunks = await collect(dispatcher, asked(max_tokens=30, stop_token_ids=(stop_id,)))
    assert text_of(chunks) == "the "
    assert (chunks[-1].stopped_by, chunks[-1].usage.completion_tokens) == (stop_id, 5)
    assert chunks[-1].token_ids[-1] == stop_id


async def test_logprobs_come_one_per_token(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes())
    chunks = await collect(dispatcher, asked(max_tokens=12, logprobs=1))
    for chunk in chunks:
        assert tuple(item.token_id for item in chunk.logprobs) == chunk.token_ids


async def test_echo_comes_first_and_is_not_counted(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes())
    request = GenerateRequest(Prompt(token_ids=dispatcher.tokenizer.encode(PROMPT)), SamplingAsked(max_tokens=3), echo=True)
    chunks = await collect(dispatcher, request)
    assert text_of(chunks) == PROMPT + "the"
    assert chunks[-1].usage.completion_tokens == 3


async def test_doubled_and_late_events_change_nothing(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    prefill.faults.stutter = decode.faults.stutter = True
    chunks = await collect(dispatcher, asked(max_tokens=50, logprobs=0))
    assert text_of(chunks) == echo(50)


async def test_leaving_the_iterator_cancels_on_both_nodes(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode)
    async with aclosing(dispatcher.generate(asked(max_tokens=3000))) as chunks:
        async for chunk in chunks:
            if chunk.token_ids:
                break
    assert dispatcher.num_running == 0
    await until(lambda: decode.cancelled and prefill.cancelled and not decode.num_active, "cancels")
    assert b'baton_requests_total{outcome="cancelled"} 1.0' in dispatcher.metrics()


async def test_the_deadline_ends_a_request_that_no_node_answers(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    decode.faults.silent = True
    with pytest.raises(DeadlineExceeded, match="0 of at most 8 tokens"):
        await collect(dispatcher, asked(max_tokens=8, timeout_s=0.3))
    await until(lambda: decode.cancelled and prefill.cancelled, "cancels")
    assert prefill.num_active == 0


async def test_a_full_cluster_refuses_before_the_first_token(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    decode.faults.refuse = ResourceExhausted("no blocks: 0 of 64 free", stage="decode", node="decode-0", retry_after_s=2.0)
    with pytest.raises(ResourceExhausted, match="0 of 64") as caught:
        await collect(dispatcher, asked(max_tokens=8))
    assert caught.value.retry_after_s == 2.0
    await until(lambda: prefill.num_active == 0, "prefill to be cancelled")


async def test_another_decode_group_reads_the_same_lease(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(2)
    dispatcher = await make_dispatcher(prefill, first, second)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "both proofs")
    first.faults.refuse = ResourceExhausted("full", stage="decode", node="decode-0")
    before = len(prefill.received)
    chunks = await collect(dispatcher, asked(max_tokens=30))
    assert text_of(chunks) == echo(30)
    assert "decode-1/0" in chunks[-1].served_by
    assert len(prefill.received) == before + 1
    assert prefill.leases[-1] == second.leases[-1]


async def test_a_cluster_full_of_decode_groups_refuses_after_one_prefill(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(2)
    dispatcher = await make_dispatcher(prefill, first, second)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "both proofs")
    first.faults.refuse = second.faults.refuse = ResourceExhausted("full", stage="decode")
    before = [len(node.received) for node in (prefill, first, second)]
    with pytest.raises(ResourceExhausted):
        await collect(dispatcher, asked(max_tokens=30))
    assert [len(node.received) for node in (prefill, first, second)] == [count + 1 for count in before]


async def test_a_request_is_one_line_in_the_log_under_its_id(make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = await make_dispatcher(*nodes())
    with caplog.at_level(logging.INFO, logger="router.dispatch"):
        await collect(dispatcher, replace(asked(max_tokens=3), request_id="mine"))
    (record,) = [record for record in caplog.records if record.name == "router.dispatch"]
    said = record.__dict__["baton_fields"]
    assert (said["request"], said["outcome"], said["completion_tokens"]) == ("mine", "length", 3)
    assert said["served_by"]


async def test_a_request_goes_on_after_its_decode_node_breaks(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(2)
    dispatcher = await make_dispatcher(prefill, first, second)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "both proofs")
    first.faults.die_at = second.faults.die_at = 20
    chunks = await collect(dispatcher, asked(max_tokens=60, logprobs=0))
    assert text_of(chunks) == echo(60)
    assert [logprob.token_id for chunk in chunks for logprob in chunk.logprobs] == [i for chunk in chunks for i in chunk.token_ids]
    assert chunks[-1].usage.completion_tokens == 60
    assert any(len(request.emitted_ids) >= 20 for request in prefill.received)


async def test_a_request_goes_on_on_the_same_pair_once_it_is_back(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    decode.faults.die_at = 10
    assert text_of(await collect(dispatcher, asked(max_tokens=30))) == echo(30)
    first = next(request for request in decode.received if not request.request_id.startswith("proof-"))
    assert first.key in decode.cancelled, "a node that comes back in the same life is told what it missed"


async def test_a_lease_that_ends_with_the_first_token_is_no_failure(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = EchoNode("prefill", "prefill-0", step_s=0.01), EchoNode("decode", "decode-0")
    dispatcher = await make_dispatcher(prefill, decode)
    prefill.step_s = 0.02  # its last word comes after decode's error
    decode.faults.fail_at = (0, LeaseLost("the request ended with its first token", stage="prefill"))
    stop_id = dispatcher.tokenizer.encode(PROMPT[0])[0]
    before = len(prefill.received)
    chunks = await collect(dispatcher, asked(max_tokens=30, stop_token_ids=(stop_id,)))
    assert (chunks[-1].finish_reason, chunks[-1].usage.completion_tokens) == (FinishReason.STOP, 1)
    assert len(prefill.received) == before + 1


async def test_a_pair_is_introduced_until_it_is_proven(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    pulls = [lease for lease in decode.leases if lease]
    assert decode.num_introductions == len(pulls) > 0
    await collect(dispatcher, asked(max_tokens=5))
    assert decode.num_introductions == len(pulls)
    assert decode.leases[-1]


@pytest.mark.parametrize(
    "error", [LeaseLost("revoked", stage="pull"), Unavailable("suspended", cause="suspended"), ResourceExhausted("full", stage="decode")]
)
async def test_a_retryable_error_after_the_first_token_is_retried(make_dispatcher: MakeDispatcher, error: BatonError) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    decode.faults.fail_at = (7, error)
    assert text_of(await collect(dispatcher, asked(max_tokens=30))) == echo(30)
    assert f'baton_retries_total{{cause="{error.cause}"}} 1.0'.encode() in dispatcher.metrics()


async def test_an_error_without_sense_in_a_retry_ends_the_request(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    decode.faults.fail_at = (7, InternalError("a NaN in the logits", stage="decode", node="decode-0", cause="logits"))
    with pytest.raises(InternalError, match="NaN"):
        await collect(dispatcher, asked(max_tokens=30))
    assert dispatcher.num_running == 0


async def test_a_silent_node_is_lost_after_its_patience(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(2, beat_s=0.05)
    dispatcher = await make_dispatcher(prefill, first, second, beat_s=0.05)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "both proofs")
    first.faults.mute = True
    assert text_of(await collect(dispatcher, asked(max_tokens=30))) == echo(30)


async def test_a_proof_that_fails_for_good_ends_the_wait_and_one_that_may_pass_does_not(make_dispatcher: MakeDispatcher) -> None:
    decode = EchoNode("decode", "decode-0")
    decode.faults.refuse = InternalError("the logits are not finite")
    dispatcher = await make_dispatcher(EchoNode("prefill", "prefill-0"), decode, wait=False)
    with pytest.raises(Unavailable, match=r"passed its proof.*not finite") as caught:
        await dispatcher.wait_ready(20)
    assert (caught.value.cause, caught.value.retryable) == ("proof", False)
    decode.faults.refuse = None
    await until(dispatcher.fleet.registry.complete, "a later proof")
    assert await dispatcher.wait_ready(20)


async def test_an_incompatible_pair_is_refused_with_both_descriptions(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = EchoNode("prefill", "prefill-0"), EchoNode("decode", "decode-0", fingerprint="other")
    dispatcher = await make_dispatcher(prefill, decode, wait=False)
    await until(lambda: dispatcher.fleet.registry.pairs()[0].known, "hellos")
    refusal = dispatcher.status()["pairs"][0]["refusal"]
    assert "echo" in refusal and "other" in refusal
    assert not dispatcher.ready()
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(collect(dispatcher, asked(max_tokens=4)), 5)
    assert (caught.value.cause, caught.value.retryable) == ("incompatible", False)
    assert refusal in caught.value.message
    with pytest.raises(Unavailable, match="model: echo there, other here"):
        await dispatcher.wait_ready(20)
    fitting = EchoNode("decode", "decode-1")
    try:
        dispatcher.add_group("decode", await fitting.start())
        assert text_of(await collect(dispatcher, asked(max_tokens=4))) == echo(4), "one that fits is enough"
        assert all(request.request_id.startswith("proof-") for request in decode.received), "from when it was there alone"
    finally:
        await dispatcher.close()
        await fitting.stop()


async def test_without_nodes_the_answer_is_unavailable(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(wait=False)
    with pytest.raises(Unavailable, match="0 of 0 prefill") as caught:
        await collect(dispatcher, asked(max_tokens=4, timeout_s=0.3))
    assert caught.value.cause == "no_nodes"


async def test_a_pair_is_proven_again_in_every_new_life(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    pair = dispatcher.fleet.registry.pairs()[0]
    port = int(decode.address.rpartition(":")[2])
    await decode.stop()
    await until(lambda: not pair.reachable, "the loss to be seen")
    reborn = EchoNode("decode", "decode-0")
    await reborn.start(port)
    try:
        await until(lambda: pair.usable, "a new proof")
        assert reborn.received[0].request_id.startswith("proof-")
    finally:
        await reborn.stop()


async def test_a_failed_proof_is_tried_again(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    decode.faults.fail_at = (1, InternalError("cannot map the pool", stage="pull"))
    dispatcher = await make_dispatcher(prefill, decode)
    assert dispatcher.ready()
    assert len(decode.received) == 3, "the pair and decode alone, and one of them twice"


async def test_a_failed_pull_takes_the_proof_away_until_the_next(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    proofs = len([request for request in decode.received if request.request_id.startswith("proof-")])
    decode.faults.fail_at = (0, Unavailable("connection refused", stage="pull", cause="transport"))
    assert text_of(await collect(dispatcher, asked(max_tokens=30))) == echo(30)
    assert len([request for request in decode.received if request.request_id.startswith("proof-")]) == proofs + 1


async def test_the_queue_is_bounded_and_moves_on(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes(step_s=0.005), max_running=1, max_queue=1)
    first = asyncio.create_task(collect(dispatcher, asked(max_tokens=40)))
    await until(lambda: dispatcher.num_running == 1, "the first to run")
    second = asyncio.create_task(collect(dispatcher, asked(max_tokens=4)))
    await until(lambda: dispatcher.status()["requests_queued"] == 1, "the second to wait")
    with pytest.raises(ResourceExhausted, match="at most 1"):
        await collect(dispatcher, asked(max_tokens=4))
    assert text_of(await first) == echo(40)
    assert text_of(await second) == echo(4)
    assert dispatcher.num_running == 0


async def test_a_queued_request_ends_at_its_deadline(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes(step_s=0.01), max_running=1)
    first = asyncio.create_task(collect(dispatcher, asked(max_tokens=3000)))
    await until(lambda: dispatcher.num_running == 1, "the first to run")
    with pytest.raises(DeadlineExceeded, match="queue"):
        await collect(dispatcher, asked(max_tokens=4, timeout_s=0.2))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert dispatcher.num_running == 0


async def test_a_client_that_does_not_read_is_given_up(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.01)
    dispatcher = await make_dispatcher(prefill, decode, slow_client_s=0.2)
    async with aclosing(dispatcher.generate(asked(max_tokens=3000))) as chunks:
        await anext(chunks)
        await until(lambda: decode.cancelled and dispatcher.num_running == 0, "the nodes to be told")
        with pytest.raises(Cancelled, match="unread"):
            await anext(chunks)
    assert b'outcome="slow_client"' in dispatcher.metrics()


async def test_draining_waits_for_what_runs_and_takes_nothing_new(make_dispatcher: MakeDispatcher) -> None:
    prefill, decode = nodes(step_s=0.005)
    dispatcher = await make_dispatcher(prefill, decode)
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=40)))
    await until(lambda: decode.num_active == 1, "the request to run")
    assert (await dispatcher.drain("decode-0", 20)).idle
    assert text_of(await running) == echo(40)
    with pytest.raises(Unavailable):
        await collect(dispatcher, asked(max_tokens=4, timeout_s=0.3))
    with pytest.raises(NotFound, match="decode-0, prefill-0"):
        await dispatcher.drain("decode-7", 1)


async def test_draining_does_not_wait_for_a_node_that_is_no_longer_understood(make_dispatcher: MakeDispatcher) -> None:
    """What it last said about its load is of no use: whatever ran there has gone on elsewhere."""
    prefill, decode = nodes(beat_s=0.02)
    dispatcher = await make_dispatcher(prefill, decode)
    pair = dispatcher.fleet.registry.pairs()[0]
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=4000)))
    await until(lambda: not pair.decode.idle, "the request to run")
    port = int(decode.address.rpartition(":")[2])
    await decode.stop()
    decode.protocol_version = 1
    await decode.start(port)
    await until(lambda: pair.refusal, "the refusal")
    assert (await dispatcher.drain("decode-0", 0.5)).idle
    running.cancel()
    await asyncio.wait([running])


async def test_a_removed_group_is_left_and_its_requests_go_on(make_dispatcher: MakeDispatcher) -> None:
    prefill, first, second = nodes(2, step_s=0.005)
    dispatcher = await make_dispatcher(prefill, first, second)
    await until(lambda: all(pair.usable for pair in dispatcher.fleet.registry.pairs()), "both proofs")
    running = asyncio.create_task(collect(dispatcher, asked(max_tokens=60)))
    await until(lambda: first.num_active + second.num_active == 1, "decode to run")
    await dispatcher.remove_group((first if first.num_active else second).address)
    assert text_of(await running) == echo(60)
    assert len(dispatcher.status()["groups"]) == 2


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (GenerateRequest(Prompt(text="x"), n=0), InvalidRequest, "n "),
        (GenerateRequest(Prompt(text="")), InvalidRequest, "prompt"),
        (GenerateRequest(Prompt(text="x" * 5000)), InvalidRequest, "4096"),
        (GenerateRequest(Prompt(text="x"), SamplingAsked(temperature=-1.0)), InvalidRequest, "temperature"),
        (GenerateRequest(Prompt(text="x"), SamplingAsked(max_tokens=5000)), InvalidRequest, "5000"),
        (GenerateRequest(Prompt(text="x"), request_id="x" * 300), InvalidRequest, "300"),
        (GenerateRequest(Prompt(text="x"), timeout_s=1e6), InvalidRequest, "timeout"),
        (GenerateRequest(Prompt(token_ids=(100_000,))), InvalidRequest, "prompt"),
        (GenerateRequest(Prompt(text="x"), model="gpt-9"), NotFound, "gpt-9"),
    ],
)
async def test_bad_requests_cost_no_node_anything(
    make_dispatcher: MakeDispatcher, request_: GenerateRequest, error: type[BatonError], words: str
) -> None:
    prefill, decode = nodes()
    dispatcher = await make_dispatcher(prefill, decode)
    before = len(prefill.received)
    with pytest.raises(error, match=words):
        await collect(dispatcher, request_)
    assert len(prefill.received) == before
    assert dispatcher.num_running == 0


async def test_many_requests_at_once_all_come_right(make_dispatcher: MakeDispatcher) -> None:
    dispatcher = await make_dispatcher(*nodes(2))
    answers = await asyncio.gather(*(collect(dispatcher, asked(max_tokens=1 + i % 40)) for i in range(64)))
    assert [text_of(chunks) for chunks in answers] == [echo(1 + i % 40) for i in range(64)]
    assert dispatcher.num_running == 0
