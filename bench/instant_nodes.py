"""Nodes that compute nothing: prefill answers at once, decode says one token per sequence and step. What is left is the router.

    python -m bench.instant_nodes --step-ms 20 --vocab-size 32000     prints the addresses: prefill, then decode

They speak the production protocol, one message per step with columns of tokens, over real gRPC. A sequence lives on the stream that
asked for it, from its request to its last token, a Cancel, or the stream's end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.config import PROTOCOL_VERSION
from baton.request import BlockCounts, Drawn, FinishReason, SequenceRequest, TokenEvent
from baton.rpc import bind, make_server
from baton.v1 import node_pb2, node_pb2_grpc
from baton.wire import counts_to_message, drawn_to_message, sequence_from_message, token_event_to_message

NUM_BLOCKS, BLOCK_SIZE = 2**20, 16
FIRST_ID, NUM_IDS = 1000, 997  # what is said: as many different tokens, but for the first ones of a vocabulary, which are special
BEAT_S = 1.0
Context = grpc.aio.ServicerContext[Any, Any]


def token_at(index: int, vocab_size: int) -> int:
    """What every sequence says at an output index."""
    return FIRST_ID % vocab_size + (index * 7919) % min(NUM_IDS, max(1, vocab_size - FIRST_ID))


class InstantNode:
    """One group leader of either role. Owner: whoever starts it; it must stop it, which ends all streams.

    step_s: how long a decode step takes at least; 0: as fast as the router reads.
    """

    def __init__(self, role: str, *, step_s: float = 0.0, vocab_size: int = 32_000) -> None:
        self.role = role
        self.step_s = step_s
        self.vocab_size = vocab_size
        self.address = ""
        self._incarnation = secrets.token_bytes(16)
        self._server = make_server()

    async def start(self) -> str:
        """Listen on loopback; returns host:port."""
        if self.role == "prefill":
            node_pb2_grpc.add_PrefillNodeServicer_to_server(_PrefillFace(self), self._server)
        else:
            node_pb2_grpc.add_DecodeNodeServicer_to_server(_DecodeFace(self), self._server)
        self.address = f"127.0.0.1:{bind(self._server, '127.0.0.1', 0)}"
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        """End all streams at once."""
        await self._server.stop(None)

    def hello(self) -> node_pb2.NodeHello:
        """Who it says it is."""
        layout = node_pb2.KVLayout(
            axes=("block", "layer", "part", "head", "slot", "dim"),
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_layers=1,
            part_dims=(8, 8),
            num_heads=1,
            dtype="float32",
            model_num_layers=1,
            model_num_kv_heads=1,
        )
        is_source = self.role == "prefill"
        return node_pb2.NodeHello(
            protocol_version=PROTOCOL_VERSION,
            node=f"{self.role}-0",
            incarnation=self._incarnation,
            model_fingerprint="instant",
            dtype="float32",
            max_model_len=2**20,
            layout=layout,
            ranks=[node_pb2.RankInfo(rank=0, pid=os.getpid(), host="127.0.0.1")],
            transfer_address=self.address if is_source else "",
            exports=[node_pb2.ExportHandle(rank=0, tcp_address=self.address)] if is_source else [],
        )


class _Session:
    """One router's stream. Columns of what is under way; a row goes when its sequence has said its last token, or is cancelled."""

    def __init__(self, node: InstantNode) -> None:
        self._node = node
        self._active: dict[tuple[str, int], SequenceRequest] = {}
        self._next: dict[tuple[str, int], int] = {}
        self._unsaid = node_pb2.NodeEvent()
        self._num_taken = 0
        self._work = asyncio.Event()

    async def run(self, commands: AsyncIterator[Any], context: Context) -> None:
        """Serve until either side ends it."""
        await anext(commands)  # the router's hello
        await context.write(node_pb2.NodeEvent(hello=self._node.hello(), load=self._load()))
        talking = asyncio.create_task(self._talk(context))
        try:
            async for command in commands:
                self._num_taken += 1
                self._take(command)
                self._work.set()
        finally:
            talking.cancel()
            await asyncio.wait([talking])

    def _take(self, command: Any) -> None:
        match command.WhichOneof("command"):
            case "prefill":
                request = sequence_from_message(command.prefill.sequence)
                self._unsaid.tokens.append(token_event_to_message(self._token(request, len(request.emitted_ids), cached_tokens=0)))
            case "decode":
                request = sequence_from_message(command.decode.sequence)
                self._unsaid.accepted.append(node_pb2.Accepted(request_id=request.request_id, attempt=request.attempt))
                self._active[request.key] = request
                self._next[request.key] = len(request.emitted_ids)
            case "cancel":
                cancel = command.cancel
                for key in [key for key in self._active if key[0] == cancel.request_id and key[1] <= cancel.attempt]:
                    self._drop(key)
            case "check":
                self._know(command.check)

    def _know(self, asked: node_pb2.Check) -> None:
        if (index := self._next.get((asked.request_id, asked.attempt))) is not None:
            self._unsaid.known.append(node_pb2.Known(request_id=asked.request_id, attempt=asked.attempt, next_index=index))

    def _drop(self, key: tuple[str, int]) -> None:
        del self._active[key], self._next[key]

    def _token(self, request: SequenceRequest, index: int, cached_tokens: int | None = None) -> TokenEvent:
        token_id = token_at(index, self._node.vocab_size)
        reason = request.sampling.finish(index + 1, token_id)
        return TokenEvent(request.request_id, request.attempt, index, (token_id,), finish_reason=reason, cached_tokens=cached_tokens)

    async def _talk(self, context: Context) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            self._work.clear()  # now: what comes from here on is another message's
            self._step()
            self._unsaid.load.CopyFrom(self._load())
            event, self._unsaid = self._unsaid, node_pb2.NodeEvent()
            await context.write(event)
            if self._active:
                await asyncio.sleep(max(0.0, began_s + self._node.step_s - loop.time()))
            else:
                await self._rest()

    async def _rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self._work.wait()

    def _step(self) -> None:
        drawn, ends = Drawn(), []
        for key, request in self._active.items():
            index, last = self._next[key], request.sampling.max_tokens - 1
            self._next[key] = index + 1
            if index < last:
                drawn.append(*key, index, token_at(index, self._node.vocab_size))
            else:
                ends.append(TokenEvent(*key, index, (token_at(index, self._node.vocab_size),), finish_reason=FinishReason.LENGTH))
        for event in ends:
            self._unsaid.tokens.append(token_event_to_message(event))
            self._drop((event.request_id, event.attempt))
        self._unsaid.drawn.CopyFrom(drawn_to_message(drawn))

    def _load(self) -> node_pb2.Load:
        counts = BlockCounts(total=NUM_BLOCKS, free=NUM_BLOCKS, cached=0, held=0, quarantined=0)
        return node_pb2.Load(running_sequences=len(self._active), blocks=counts_to_message(counts), taken=self._num_taken)


class _PrefillFace(node_pb2_grpc.PrefillNodeServicer):
    def __init__(self, node: InstantNode) -> None:
        self._node = node

    async def Control(self, commands: AsyncIterator[node_pb2.PrefillCommand], context: Context) -> None:
        await _Session(self._node).run(commands, context)


class _DecodeFace(node_pb2_grpc.DecodeNodeServicer):
    def __init__(self, node: InstantNode) -> None:
        self._node = node

    async def Control(self, commands: AsyncIterator[node_pb2.DecodeCommand], context: Context) -> None:
        await _Session(self._node).run(commands, context)


async def _serve(step_s: float, vocab_size: int) -> None:
    nodes = [InstantNode(role, step_s=step_s, vocab_size=vocab_size) for role in ("prefill", "decode")]
    print(*[await node.start() for node in nodes], flush=True)
    await asyncio.Event().wait()  # until whoever started this process ends it


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.step_ms / 1000, arguments.vocab_size))


if __name__ == "__main__":
    main()
