"""The gRPC face of the router: Inference and Admin over a Dispatcher, with health and reflection.

Knows messages, keys and statuses; decides nothing about requests. A call that is cancelled, or whose client has gone, cancels
its request everywhere.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from baton.errors import BatonError, Cancelled, InternalError, Unauthenticated
from baton.request import Chunk
from baton.rpc import Health, abort
from baton.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, node_pb2
from baton.wire import chunk_to_message, counts_to_message, generate_request_from_message, time_left_from_message
from router.choices import whole
from router.dispatch import Dispatcher
from router.group import Group, Pair
from router.heard import GroupLoad
from router.membership import NodeReport

log = logging.getLogger(__name__)

SERVICES = ("baton.v1.Inference", "baton.v1.Admin")
STATUS_S = 5.0  # what a client gets to read how its call has ended
Context = grpc.aio.ServicerContext[Any, Any]


class Keys:
    """Which API keys may use this router; none configured means that none is needed."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def check(self, context: Context) -> None:
        """Raise Unauthenticated unless the call's metadata carries `authorization: Bearer KEY`. Compares in constant time."""
        if not self._keys:
            return
        given = [str(value) for name, value in context.invocation_metadata() or () if name == "authorization"]
        shown = given[0].removeprefix("Bearer ").encode() if given and given[0].startswith("Bearer ") else b""
        if not sum(hmac.compare_digest(shown, key) for key in self._keys):  # looks at all, so that time tells nothing
            raise Unauthenticated("this router needs an API key: send metadata `authorization: Bearer KEY`", stage="router")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """baton.v1.Inference."""

    def __init__(self, dispatcher: Dispatcher, keys: Keys, slow_client_s: float) -> None:
        self._dispatcher = dispatcher
        self._keys = keys
        self._slow_client_s = slow_client_s

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """Stream the answer; an error ends the stream with its status and an ErrorDetail."""
        try:
            self._keys.check(context)
            asked = generate_request_from_message(request, context.time_remaining())
            async with aclosing(self._dispatcher.generate(asked)) as chunks:
                async for chunk in chunks if asked.stream else gathered(chunks):
                    await self._write(context, chunk)
        except BatonError as error:
            await self._end(context, error)
        except Exception as error:
            log.exception("Generate failed for a reason of ours")
            await self._end(context, InternalError(f"the router failed: {error!r}", stage="router"))

    async def Models(self, request: inference_pb2.ModelsRequest, context: Context) -> inference_pb2.ModelsReply:
        """What this cluster serves."""
        await check_key(self._keys, context)
        card = self._dispatcher.model_card()
        model = inference_pb2.ModelCard(name=card.name, max_model_len=card.max_model_len, dtype=self._dispatcher.dtype())
        return inference_pb2.ModelsReply(models=[model])

    async def _write(self, context: Context, chunk: Chunk) -> None:
        # The dispatcher gives up on a client that does not read; here only the blocked write has to be ended, a little later.
        try:
            async with asyncio.timeout(self._slow_client_s + 1):
                await context.write(chunk_to_message(chunk))
        except TimeoutError:
            raise Cancelled("the client left its stream unread", stage="router", cause="slow_client") from None

    async def _end(self, context: Context, error: BatonError) -> None:
        # A status waits behind all that the client has left unread. Without this, who never reads keeps a place among the calls.
        try:
            async with asyncio.timeout(STATUS_S):
                await abort(context, error)
        except TimeoutError:
            raise asyncio.CancelledError from None  # to gRPC: the call is over, whatever the client has of it


class AdminService(admin_pb2_grpc.AdminServicer):
    """baton.v1.Admin."""

    def __init__(self, dispatcher: Dispatcher, keys: Keys) -> None:
        self._dispatcher = dispatcher
        self._keys = keys

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusReply:
        """All groups and pairs."""
        await check_key(self._keys, context)
        registry = self._dispatcher.fleet.registry
        return admin_pb2.StatusReply(
            ready=self._dispatcher.ready(),
            model=self._dispatcher.model_card().name,
            groups=[group_to_message(group) for group in registry.groups()],
            pairs=[pair_to_message(pair) for pair in registry.pairs()],
            nodes=[node_to_message(report) for report in registry.reports.values()],
            requests_running=self._dispatcher.num_running,
            requests_total=self._dispatcher.num_received,
            router_pid=os.getpid(),
        )

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainReply:
        """Send no new work to a node; what is still there after timeout_s (0: at once) goes on elsewhere."""
        await check_key(self._keys, context)
        try:
            timeout_s = time_left_from_message(request.timeout_s)
            drained = await self._dispatcher.drain(request.node, timeout_s, request.retire)
        except BatonError as error:
            await abort(context, error)
        return admin_pb2.DrainReply(idle=drained.idle, handed_over=drained.handed_over)

    async def Restore(self, request: admin_pb2.RestoreRequest, context: Context) -> admin_pb2.RestoreReply:
        """Take a drained node back into service."""
        await check_key(self._keys, context)
        try:
            self._dispatcher.restore(request.node)
        except BatonError as error:
            await abort(context, error)
        return admin_pb2.RestoreReply()

    async def FlushCache(self, request: admin_pb2.FlushCacheRequest, context: Context) -> admin_pb2.FlushCacheReply:
        """Forget cached prefixes that no sequence uses."""
        await check_key(self._keys, context)
        try:
            flushed = await self._dispatcher.flush_cache(request.node)
        except BatonError as error:
            await abort(context, error)
        return admin_pb2.FlushCacheReply(groups=flushed.groups, blocks=flushed.blocks)


def add_services(server: grpc.aio.Server, dispatcher: Dispatcher, api_keys: Sequence[str], slow_client_s: float) -> Health:
    """Put the router's services, health and reflection on a server."""
    keys = Keys(api_keys)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(dispatcher, keys, slow_client_s), server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(dispatcher, keys), server)
    return Health(server, SERVICES)


async def check_key(keys: Keys, context: Context) -> None:
    """End the call unless its key is good."""
    try:
        keys.check(context)
    except Unauthenticated as error:
        await abort(context, error)


async def gathered(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """One chunk per choice, once all have ended; the last carries the usage."""
    parts: dict[int, list[Chunk]] = {}
    order: list[int] = []
    async for chunk in chunks:
        parts.setdefault(chunk.choice, []).append(chunk)
        if chunk.finish_reason is not None:
            order.append(chunk.choice)
    for choice in order:
        yield whole(parts[choice])


def group_to_message(group: Group) -> admin_pb2.GroupStatus:
    """One group for operators."""
    ranks = group.hello.ranks if group.hello else ()
    return admin_pb2.GroupStatus(
        node=group.node,
        group=group.number,
        role=group.role.value,
        incarnation=group.incarnation,
        ranks=[node_pb2.RankInfo(rank=rank.rank, pid=rank.pid, host=rank.host) for rank in ranks],
        load=load_to_message(group.load),
        state=group.state.value,
    )


def pair_to_message(pair: Pair) -> admin_pb2.PairStatus:
    """One pair for operators; prefill "": the decode group alone."""
    prefill = pair.prefill.name if pair.prefill else ""
    return admin_pb2.PairStatus(prefill=prefill, decode=pair.decode.name, proven=pair.proven, refusal=pair.refusal)


def node_to_message(report: NodeReport) -> admin_pb2.NodeStatus:
    """A node as its supervisor sees it."""
    return admin_pb2.NodeStatus(node=report.node, role=report.role, stage=report.stage, why=report.why, lives=report.lives)


def load_to_message(load: GroupLoad) -> node_pb2.Load:
    """A group's figures."""
    return node_pb2.Load(
        waiting_sequences=load.waiting_sequences,
        running_sequences=load.running_sequences,
        waiting_tokens=load.waiting_tokens,
        blocks=counts_to_message(load.blocks),
        open_leases=load.open_leases,
        open_pulls=load.open_pulls,
        steps=load.steps,
        step_seconds=load.step_seconds,
        draining=load.draining,
    )
