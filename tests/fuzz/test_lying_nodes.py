"""A router that meets nodes which say anything on their control streams.

Such a node costs its own stream and nothing else: it is refused or lost, counted, and requests go on being served by the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from baton.client import Client
from baton.config import PROTOCOL_VERSION
from baton.v1 import node_pb2
from tests.fuzz.conftest import Running
from tests.fuzz.hostile import PATIENCE_S, effort, messages, near, no_alarms, noise
from tests.fuzz.scripted import Liar
from tests.router.echo_nodes import EchoNode

NUM_LIARS = 6
# gRPC logs bytes that are no message as it finds them, and whom this router does not work with is the operator's affair.
EXPECTED = ("Exception deserializing message!", "refused a node", "refused a pair")


def hello(role: str) -> node_pb2.NodeEvent:
    """What an echo node would say, under another name."""
    return node_pb2.NodeEvent(hello=EchoNode(role, f"{role}-9", max_model_len=128).hello())


WORDS: list[Message] = [
    node_pb2.NodeEvent(load=node_pb2.Load(beat=1)),
    node_pb2.NodeEvent(tokens=[node_pb2.TokenEvent(request_id="r", attempt=1, token_ids=[1])]),
    node_pb2.NodeEvent(drawn=node_pb2.Drawn(request_ids=["r", "s"], attempts=[1, 2], output_indices=[0, 1], token_ids=[1, 2])),
    node_pb2.NodeEvent(accepted=[node_pb2.Accepted(request_id="r", attempt=1)], known=[node_pb2.Known(request_id="r", next_index=9)]),
    node_pb2.NodeEvent(errors=[node_pb2.SequenceError(request_id="r", attempt=1, code=99)], pulls=[node_pb2.PullReport(seconds=1.0)]),
    node_pb2.NodeEvent(flushed=[node_pb2.CacheFlushed(number=1, blocks=1)]),
]


def scripts() -> st.SearchStrategy[tuple[str, list[bytes]]]:
    """The role that the router takes the node for, and what the node says: a hello, mostly a good one, and then anything."""
    return st.sampled_from(["prefill", "decode"]).flatmap(lambda role: st.tuples(st.just(role), _lines(hello(role))))


def _lines(greeting: node_pb2.NodeEvent) -> st.SearchStrategy[list[bytes]]:
    start = st.just([greeting]) | near(greeting).map(lambda said: [said]) | st.just([])
    more = st.lists(st.sampled_from(WORDS).flatmap(near) | messages(node_pb2.NodeEvent), max_size=3)
    said = st.builds(list.__add__, start, more).map(lambda events: [event.SerializeToString() for event in events])
    return said | st.builds(list.__add__, said, noise(greeting.SerializeToString()).map(lambda raw: [raw]))


@pytest.fixture
async def liars() -> AsyncIterator[list[Liar]]:
    made = [Liar() for _ in range(NUM_LIARS)]
    for liar in made:
        await liar.start()
    yield made
    for liar in made:
        await liar.stop()


async def meet(router: Running, liar: Liar, role: str, lines: list[bytes], hangs_up: bool) -> None:
    """Have the router listen to it all, and forget it again."""
    liar.lines, liar.hangs_up, before, liar.num_calls = lines, hangs_up, liar.num_told, 0
    router.dispatcher.add_group(role, liar.address)
    while liar.num_told == before and not (liar.num_calls and not liar.num_open):  # noqa: ASYNC110 - it has said all, or was cut off
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    await router.dispatcher.remove_group(liar.address)


@effort(6)
@given(batch=st.lists(st.tuples(scripts(), st.booleans()), min_size=NUM_LIARS, max_size=NUM_LIARS))
async def test_a_node_that_says_anything_costs_nobody_else(
    router: Running, liars: list[Liar], batch: list[tuple[tuple[str, list[bytes]], bool]]
) -> None:
    with no_alarms() as alarms:
        async with asyncio.timeout(PATIENCE_S):
            parts = zip(liars, batch, strict=True)
            await asyncio.gather(*(meet(router, liar, role, lines, hangs_up) for liar, ((role, lines), hangs_up) in parts))
        async with Client(router.grpc) as client, asyncio.timeout(PATIENCE_S):
            (choice,) = await client.complete("abc", max_tokens=5, ignore_eos=True)
        assert choice.text == "abcab"
        alarms.heard = [alarm for alarm in alarms.heard if not alarm.startswith(EXPECTED)]
    assert router.dispatcher.metrics().count(b"\n") < 2000


def test_the_hello_of_the_script_is_a_good_one() -> None:
    assert hello("prefill").hello.protocol_version == PROTOCOL_VERSION
