"""A prefill rank and a decode rank in this process, and a router that says what a test tells it: real engine, real gRPC, no Ray.

Every wait here ends after PATIENCE_S: a test that hangs says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from baton.config import PROTOCOL_VERSION, BatonConfig, RankPlan
from baton.engine.batch import Batch
from baton.engine.runner import StepOutcome
from baton.request import Sampling, SequenceRequest, TokenEvent
from baton.rpc import open_channel
from baton.v1 import node_pb2, node_pb2_grpc
from baton.wire import drawn_from_message, sequence_to_message, token_event_from_message
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from ranks.host import RankHost
from ranks.node import RankLife
from ranks.service import Peer

PATIENCE_S = 10.0
LOOK_EVERY_S = 0.005
BEAT_S = 0.5
BLOCK_SIZE = 16
BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE * 16 * 4  # of the tiny llama in fp32: layers, parts, heads, slots, dim, bytes


async def eventually(condition: Callable[[], bool], what: str = "it") -> None:
    """Wait until the condition holds."""
    for _ in range(int(PATIENCE_S / LOOK_EVERY_S)):
        if condition():
            return
        await asyncio.sleep(LOOK_EVERY_S)
    raise AssertionError(f"{what} did not come about")


class PausableHost(RankHost):
    """A rank whose steps wait while paused, so that a test can act between plan and apply. extra_followers: more ranks that must read."""

    def __init__(self, plan: RankPlan) -> None:
        super().__init__(plan)
        self.in_step = False
        self.extra_followers: tuple[Peer, ...] = ()
        self._going = asyncio.Event()
        self._going.set()

    def pause(self) -> None:
        """The next step begins but does not end."""
        self._going.clear()

    def resume(self) -> None:
        """Steps end again."""
        self._going.set()

    async def step(self, batch: Batch | None) -> StepOutcome:
        """See RankHost."""
        self.in_step = True
        await self._going.wait()
        try:
            return await super().step(batch)
        finally:
            self.in_step = False

    @property
    def followers(self) -> tuple[Peer, ...]:
        """See RankHost."""
        return self.extra_followers


class InProcess:
    """One rank with its life, the only one of its node. Ended by `stop`. number: of the node among those of its role."""

    def __init__(self, model: Path, role: str, num_blocks: int, *, number: int = 0, **settings: object) -> None:
        config = {"model": str(model), "dtype": "float32", "block_size": BLOCK_SIZE, "kv_memory": num_blocks * BLOCK_BYTES, **settings}
        plan = {"config": config, "role": role, "node": f"{role}-{number}", "rank": 0, "threads": 1}
        self.host = PausableHost(RankPlan.model_validate(plan | {"config": BatonConfig.model_validate(config)}))
        self.life = RankLife(self.host)
        self.role = role
        self.node: Any = None
        self.streams: list[Stream] = []

    async def start(self, *extra_followers: Peer) -> InProcess:
        """Load and serve."""
        await self.life.load([await self.host.prepare()])
        self.host.extra_followers = extra_followers
        await self.life.start(PrefillNode if self.role == "prefill" else DecodeNode)
        self.node = self.life.role
        return self

    @property
    def transfers(self) -> Any:
        """The rank's transfer thread."""
        return self.node._source._thread if self.role == "prefill" else self.node._reader._reader._thread

    @property
    def leader(self) -> Any:
        """The group's leader: PrefillLeader or DecodeLeader."""
        return self.node._leader

    @property
    def idle(self) -> bool:
        """Whether nothing of any sequence is left."""
        counts = self.life.counts()
        return counts.idle() and self.leader.scheduler.idle()

    async def stream(self) -> Stream:
        """A router's stream to this rank, after both hellos."""
        self.streams.append(Stream(self.role, self.host.address.control))
        await self.streams[-1].open()
        return self.streams[-1]

    async def stop(self) -> None:
        """End the rank and the streams to it."""
        self.host.resume()
        for stream in self.streams:
            await stream.close()
        await self.life.stop()


class Stream:
    """A router's control stream to one leader, scripted by a test; beats, and keeps all that it hears. Ended by `close`.

    mute: the router has fallen silent, as if it were stopped. incarnation: of the router; each stream is another one's by default.
    """

    def __init__(self, role: str, address: str, incarnation: bytes | None = None) -> None:
        self._role = role
        self._incarnation = incarnation or os.urandom(16)
        self._channel = open_channel(address)
        self._call: Any = None
        self._saying = asyncio.Lock()
        self._listening: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self.mute = False
        self.known: list[tuple[str, int, int]] = []
        self.taken = 0
        self.status = ""
        self.hello: node_pb2.NodeHello | None = None
        self.tokens: list[TokenEvent] = []
        self.accepted: list[tuple[str, int]] = []
        self.errors: dict[tuple[str, int], node_pb2.SequenceError] = {}
        self.flushed: dict[int, int] = {}
        self.ended = False

    async def open(self) -> None:
        """Say hello and hear it."""
        stub = node_pb2_grpc.PrefillNodeStub if self._role == "prefill" else node_pb2_grpc.DecodeNodeStub
        self._call = stub(self._channel).Control()
        await self.say(hello=node_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_incarnation=self._incarnation))
        self._listening = asyncio.create_task(self._listen())
        await eventually(lambda: self.hello is not None, "hello")
        self._beating = asyncio.create_task(self._beat())

    async def say(self, **command: object) -> None:
        """Send one command."""
        kind: Any = node_pb2.PrefillCommand if self._role == "prefill" else node_pb2.DecodeCommand
        async with self._saying:
            await self._call.write(kind(**command))

    async def _beat(self) -> None:
        number = 0
        while not self.ended:
            await asyncio.sleep(BEAT_S)
            number += 1
            if not self.mute:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_listen` says that it is over
                    await self.say(beat=node_pb2.Beat(number=number))

    async def prefill(self, request: SequenceRequest, lease: int, time_left_s: float = 60.0) -> None:
        """Have a prompt computed."""
        message = sequence_to_message(request, time_left_s)
        await self.say(prefill=node_pb2.PrefillRequest(sequence=message, lease_number=lease))

    async def accept(self, lease: int) -> None:
        """Tell prefill that a decode group has room."""
        await self.say(accepted=node_pb2.DecodeAccepted(lease_number=lease))

    async def decode(self, request: SequenceRequest, source: node_pb2.NodeHello, lease: int, time_left_s: float = 60.0) -> None:
        """Have a sequence pulled from `source` and generated."""
        message = node_pb2.DecodeRequest(
            sequence=sequence_to_message(request, time_left_s),
            lease=node_pb2.LeaseId(prefill_incarnation=source.incarnation, number=lease),
            transfer_address=source.transfer_address,
            exports=source.exports,
        )
        await self.say(decode=message)

    async def decode_alone(self, request: SequenceRequest, time_left_s: float = 60.0) -> None:
        """Have a sequence computed and generated without any prefill node."""
        await self.say(decode=node_pb2.DecodeRequest(sequence=sequence_to_message(request, time_left_s)))

    async def cancel(self, request_id: str, attempt: int = 99) -> None:
        """End all attempts of a request."""
        await self.say(cancel=node_pb2.Cancel(request_id=request_id, attempt=attempt, reason="test"))

    async def check(self, request_id: str, attempt: int = 1) -> None:
        """Ask whether an attempt is still there."""
        await self.say(check=node_pb2.Check(request_id=request_id, attempt=attempt))

    async def flush(self, number: int) -> int:
        """Have cached blocks forgotten; how many were."""
        await self.say(flush=node_pb2.FlushCache(number=number))
        await eventually(lambda: number in self.flushed, "the answer to a flush")
        return self.flushed[number]

    def ids(self, request_id: str) -> dict[int, int]:
        """Tokens heard of a request, by output index."""
        return {e.output_index + i: t for e in self.tokens if e.request_id == request_id for i, t in enumerate(e.token_ids)}

    def finished(self, request_id: str) -> bool:
        """Whether an event has finished the request."""
        return any(event.request_id == request_id and event.finish_reason for event in self.tokens)

    async def close(self) -> None:
        """Break the stream."""
        self._call.cancel()
        if self._beating is not None:
            self._beating.cancel()
        if self._listening is not None:
            await asyncio.wait([self._listening])
        await self._channel.close(None)

    async def _listen(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):  # however it ends: `ended` says so
            async for event in self._call:
                self._heard(event)
        with contextlib.suppress(asyncio.CancelledError):
            self.status = await self._call.details() or ""
        self.ended = True

    def _heard(self, event: node_pb2.NodeEvent) -> None:
        if event.HasField("hello"):
            self.hello = event.hello
        said = [token_event_from_message(token) for token in event.tokens]
        self.tokens += [token for token in said if token.finish_reason is None]
        rows = drawn_from_message(event.drawn).rows()
        self.tokens += (TokenEvent(name, attempt, index, (token_id,)) for name, attempt, index, token_id in rows)
        self.tokens += [token for token in said if token.finish_reason is not None]
        self.accepted += ((item.request_id, item.attempt) for item in event.accepted)
        self.taken = max(self.taken, event.load.taken)
        self.known += ((item.request_id, item.attempt, item.next_index) for item in event.known)
        self.flushed |= {item.number: item.blocks for item in event.flushed}
        self.errors |= {(item.request_id, item.attempt): item for item in event.errors}


def ask(request_id: str, prompt_len: int, *, attempt: int = 1, seed: int = 3, max_tokens: int = 8) -> SequenceRequest:
    """A greedy request with a prompt that depends on `seed`, which no end token ends."""
    prompt = tuple(4 + (seed * 31 + i * i * 7) % 500 for i in range(prompt_len))
    return SequenceRequest(request_id, attempt, prompt, Sampling(max_tokens=max_tokens, temperature=0.0))
