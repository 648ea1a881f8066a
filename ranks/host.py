"""One rank's process: its server, its engine, its KV pool, its threads. Brings them up in order and takes them down again.

Here (and in the nodes) engine and kv_transfer meet. Knows no requests; what a rank does with its steps is its node's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.config import RankPlan
from baton.engine.batch import Batch
from baton.engine.config_json import load_spec
from baton.engine.devices.cpu_threads import bind_threads
from baton.engine.fingerprint import fingerprint
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.parallel import Groups, Rendezvous
from baton.engine.rank import Rank, set_threads
from baton.engine.runner import Runner, StepOutcome
from baton.engine.spec import ModelSpec
from baton.errors import BatonError
from baton.request import BlockCounts
from baton.rpc import Health, bind, make_server
from kv_transfer.pool import Pool
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export
from ranks.capacity import capacity
from ranks.cores import Caution, Ledger, own_cores, was_worth_it
from ranks.facts import GroupHello, LoadProgress, RankAddress, RankCounts
from ranks.layouts import node_layouts, placement_of
from ranks.service import Peer, wake_all
from ranks.session import GroupLoad
from ranks.step_thread import StepThread

INCARNATION_BYTES = 16
STOP_S = 5.0
LAST_WORD_S = 1.0


class RankHost:
    """Owner of everything a rank process holds; `close` ends it all, in the reverse order, also after half a start."""

    def __init__(self, plan: RankPlan) -> None:
        self.plan = plan
        self.server = make_server()
        self.incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self.progress = LoadProgress("waiting")
        self.services: list[str] = []
        self.peers: tuple[Peer, ...] = ()
        self.num_blocks = 0
        self.max_model_len = 0
        self._closing = contextlib.AsyncExitStack()
        self._step_thread = StepThread()
        self._ledger: Ledger | None = None
        self._cores: tuple[int, ...] = ()
        self._caution = Caution()

    async def prepare(self) -> RankAddress:
        """Bind the rank's control port and find a free one for the collectives' store."""
        port = bind(self.server, self.plan.host, 0)
        self.address = RankAddress(
            node=self.plan.node,
            rank=self.plan.rank,
            pid=os.getpid(),
            host=self.plan.host,
            control=f"{self.plan.host}:{port}",
            rendezvous_port=await self._step_thread.run(self._open_rendezvous),
        )
        return self.address

    def _open_rendezvous(self) -> int:
        """Leaders may be the first of their domain; the port, or 0 where nobody needs one."""
        if self.plan.num_ranks == 1 or self.plan.tp_rank:
            return 0
        rendezvous = Rendezvous(self.plan.host, self.plan.config.collective_timeout_s)
        self._closing.callback(rendezvous.close)
        return rendezvous.port

    async def load(self, addresses: Sequence[RankAddress]) -> None:
        """Connect to the node's other ranks, read the weights, make the KV pool, run once. addresses: the whole node's, by rank."""
        self.addresses = tuple(sorted(addresses, key=lambda address: address.rank))
        self.spec, self.fingerprint = await self._step_thread.run(self._read_spec)
        self.placement = placement_of(self.plan, self.spec, self.plan.rank)
        self.domain = [address for address in self.addresses if self._steps_with_me(address.rank)]
        self.peers = tuple(Peer(a.node, a.rank, a.control, self.plan.role) for a in self.addresses if a.rank != self.plan.rank)
        for peer in self.peers:
            self._closing.push_async_callback(peer.close)
        config = self.plan.config
        self.shape = KVShape.of(self.spec, self.placement, config.block_size)
        self.num_blocks, self.max_model_len = capacity(
            kv_memory=config.kv_memory,
            block_bytes=self.shape.block_bytes,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_positions=self.spec.max_position_embeddings,
        )
        self.layouts = node_layouts(self.plan, self.spec, self.num_blocks)
        self.layout = self.layouts[self.plan.rank]
        self.pool = Pool(
            self.num_blocks,
            self.shape.block_bytes,
            incarnation=self.incarnation,
            shared=config.transfer.transport != "tcp" and self.plan.role == "prefill",
        )
        self._closing.callback(self.pool.close)
        await self._step_thread.run(self._load_engine)
        self._ledger = self._join_ledger()
        self.progress = LoadProgress("ready")

    def _read_spec(self) -> tuple[ModelSpec, str]:
        self._use_cores(own_cores(self.plan.cores, self.plan.first_core, self.plan.threads))
        config = self.plan.config
        return load_spec(config.model, config.dtype, config.quantization), fingerprint(config.model)

    def _use_cores(self, cores: tuple[int, ...]) -> None:
        """On the step thread: what it is told here holds for operations that begin there."""
        if cores == self._cores:
            return
        if len(cores) != len(self._cores):
            set_threads(len(cores))
        if self.plan.config.binds_cores:
            bind_threads(cores)
        self._cores = cores

    def _look_round(self) -> None:
        """In the middle of a step: give back what its owner has work for now, and take what nobody has any more."""
        if self._ledger is not None:
            self._use_cores(self._worth(self._ledger.look()))

    def _worth(self, cores: tuple[int, ...]) -> tuple[int, ...]:
        """Of the cores that are this rank's now those that it should use."""
        return cores if self._caution.allows(time.monotonic()) else cores[: self.plan.threads]

    def _join_ledger(self) -> Ledger | None:
        """Where cores are lent; None where nobody could lend any."""
        plan = self.plan
        if not plan.ledger:
            return None
        ledger = Ledger(
            Path(plan.ledger),
            slot=plan.slot,
            num_slots=plan.config.num_ranks,
            first=plan.first_core,
            num=plan.threads,
            cores=plan.cores,
        )
        self._closing.callback(ledger.close)
        return ledger

    def _steps_with_me(self, rank: int) -> bool:
        return self.placement.coupled or rank // self.plan.tp_size == self.plan.group

    def _load_engine(self) -> None:
        config = self.plan.config
        self.progress = LoadProgress("connecting")
        first = self.domain[0]
        groups = Groups.connect(
            self.placement,
            first.host,
            first.rendezvous_port,
            config.collective_timeout_s,
            bind=self.plan.host,
            device=config.device,
        )
        self._closing.callback(groups.close)
        cache = KVCache(self.shape, self.num_blocks, self.pool.data, self.pool.generations)
        rank = Rank(self.spec, self.placement, groups, config.model, cache, between_layers=self._look_round)
        rank.load(lambda done, total: self._note(LoadProgress("loading weights", done, total)))
        self.runner = Runner(rank, groups)
        self._note(LoadProgress("warming up"))
        self.runner.warm_up()

    def _note(self, progress: LoadProgress) -> None:
        self.progress = progress

    async def start(self) -> None:
        """Serve what has been added to the server, with health and reflection."""
        health = Health(self.server, self.services)
        await self.server.start()
        self._closing.push_async_callback(self.server.stop, STOP_S / 2)
        await health.set_serving(True)

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are below this number."""
        return self.spec.vocab

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on this rank."""
        return self.shape.block_bytes

    @property
    def control_address(self) -> str:
        """host:port of this rank's gRPC server."""
        return self.address.control

    async def step(self, batch: Batch | None) -> StepOutcome:
        """One step together with the domain, on the step thread."""
        return await self._step_thread.run(lambda: self._step(batch))

    def _step(self, batch: Batch | None) -> StepOutcome:
        """With all cores that are this rank's now. They are its own for the next step as well, unless nobody has work for it."""
        if self._ledger is None:
            return self.runner.step(batch)
        began_s = time.monotonic()
        self._use_cores(self._worth(self._ledger.enter()))
        borrowed, asleep, computed_s = self._cores, False, time.thread_time()
        try:
            outcome = self.runner.step(batch)
            asleep = outcome.asleep
        finally:
            self._ledger.leave(idle=asleep)
        if len(borrowed) > self.plan.threads and self._cores == borrowed and not asleep:
            ended_s = time.monotonic()
            worth = was_worth_it(self.plan.threads, len(borrowed), time.thread_time() - computed_s, ended_s - began_s)
            self._caution = self._caution.after(ended_s, worth)
        return outcome

    async def step_begun(self) -> None:
        """Until the step that was asked for last is under way."""
        await self._step_thread.begun()

    async def wake_others(self, epoch: int) -> None:
        """Call the other ranks of the domain to step `epoch`."""
        await wake_all(self.partners, epoch)

    @property
    def partners(self) -> tuple[Peer, ...]:
        """The other ranks of this rank's lock-step domain."""
        return tuple(peer for peer in self.peers if self._steps_with_me(peer.rank))

    @property
    def followers(self) -> tuple[Peer, ...]:
        """The other ranks of this rank's tensor-parallel group."""
        return tuple(peer for peer in self.peers if peer.rank // self.plan.tp_size == self.plan.group)

    def hello(self, transfer_address: str = "", exports: tuple[Export, ...] = ()) -> GroupHello:
        """Who this rank's group is."""
        return GroupHello(
            node=self.plan.node,
            group=self.plan.group,
            incarnation=self.incarnation,
            model_fingerprint=self.fingerprint,
            dtype=self.spec.dtype,
            quantization=self.spec.quantization or "",
            max_model_len=self.max_model_len,
            layout=self.layout,
            ranks=tuple(address for address in self.addresses if address.rank // self.plan.tp_size == self.plan.group),
            transfer_address=transfer_address,
            exports=exports,
        )

    def counts(self, steps: int, asleep: bool, load: GroupLoad | None = None, sequences: int = 0) -> RankCounts:
        """What this rank holds. A follower has no load: its leader accounts for the group's blocks."""
        blocks = load.blocks if load else BlockCounts(0, 0, 0, 0, 0)
        return RankCounts(
            node=self.plan.node,
            rank=self.plan.rank,
            pid=os.getpid(),
            leader=self.plan.tp_rank == 0,
            total=blocks.total,
            free=blocks.free,
            cached=blocks.cached,
            held=blocks.held,
            quarantined=blocks.quarantined,
            open_leases=load.open_leases if load else 0,
            open_pulls=load.open_pulls if load else 0,
            sequences=sequences,
            steps=steps,
            asleep=asleep,
            cpu_seconds=time.process_time(),
        )

    async def hang_up(self) -> None:
        """Serve no more, after a moment for last words. For a process that is about to end: whatever else it holds goes with it.

        Its step may be stuck in native code, and then so would be whoever waits for the groups it is in.
        """
        self._step_thread.close()
        await self.server.stop(LAST_WORD_S)

    async def close(self) -> None:
        """End everything; a step under way ends by itself (its collectives have a timeout, and are broken off by closing them)."""
        self._step_thread.close()
        await self._closing.aclose()

    def start_transfers(self, failed: Callable[[BatonError], None]) -> TransferThread:
        """Start the rank's transfer thread, ended with the rank. failed: told here, on the loop, if a bug ends it before."""
        loop = asyncio.get_running_loop()
        thread = TransferThread(failed=lambda error: loop.call_soon_threadsafe(failed, error))
        self.on_close(thread.close)
        return thread

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have something ended with the rank, before what was there earlier."""
        self._closing.callback(callback)
