"""What a decode group's leader does with sequences: admits them, has their blocks pulled, runs them, tells the router.

Decisions are the scheduler's; this class carries them out. Knows no messages and no tensors.
"""

from __future__ import annotations

import asyncio

from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool
from baton.errors import BatonError, Cancelled, NodeLost, ResourceExhausted
from baton.request import SequenceRequest, TokenEvent
from baton.rpc import open_channel
from decode_node.intake import BlockReader, Intake, PullSource
from decode_node.outcome import Applied
from decode_node.scheduler import DecodeScheduler
from kv_transfer.client import PullClient
from kv_transfer.lease import FinalToken
from kv_transfer.line import OpenChannel
from ranks.desk import Desk, no_token
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.seat import Seat
from ranks.session import GroupLoad, Key, PullFacts, Session


class DecodeLeader:
    """State owner: the leader's event loop. What it holds for a sequence hangs on its desk entry, its pull and the scheduler.

    reader: has all ranks of the group read blocks. open_channel: how to connect to prefill leaders.
    """

    def __init__(self, host: Seat, reader: BlockReader, *, open_channel: OpenChannel = open_channel) -> None:
        config = host.plan.config
        self._host = host
        self._name = f"{host.plan.node}/{host.plan.group}"
        self.membership = config.membership
        # facts: where the blocks are, None if the prompt is computed here
        self.desk = Desk[PullSource | None]("decode", self._name, self._end, vocab_size=host.vocab_size)
        self.pool = BlockPool(host.num_blocks, config.block_size)
        self.scheduler = DecodeScheduler(
            self.pool,
            max_sequences=config.decode.max_sequences,
            max_waiting=config.decode.max_waiting,
            reserve_output_tokens=host.max_model_len if config.decode.overcommit == "none" else config.decode.reserve_output_tokens,
            max_step_tokens=config.decode.max_step_tokens,
            mixed_step_tokens=config.decode.mixed_step_tokens,
            max_model_len=host.max_model_len,
        )
        self.client = PullClient(handshake_s=config.transfer.handshake_s, open_channel=open_channel)
        self.intake = Intake(
            self.scheduler,
            self.client,
            reader,
            self,
            read_s=config.transfer.read_s,
            block_bytes=host.block_bytes,
            vocab_size=host.vocab_size,
        )
        self.drive = Drive(host.step, host.wake_others, self, host.step_begun)
        self._admitting: asyncio.Handle | None = None
        self._untold: list[Applied] = []  # what steps have brought, until `tell`, which comes while the next one is computed

    # What the router asks.

    def hello(self) -> GroupHello:
        """Who this group is."""
        return self._host.hello()

    def load(self) -> GroupLoad:
        """What the group carries now."""
        load = self.scheduler.load()
        return GroupLoad(
            waiting_sequences=load.waiting,
            running_sequences=load.running + load.pulling + load.computing,
            waiting_tokens=load.waiting_tokens,
            blocks=self.pool.counts(),
            open_leases=0,
            open_pulls=self.intake.num_open,
            steps=self.drive.steps,
            step_seconds=self.drive.busy_s,
        )

    def decode(self, session: Session, request: SequenceRequest, source: PullSource | None, time_left_s: float) -> None:
        """Queue a sequence, in the place of its earlier attempts; refusals go back as its error. source None: compute its prompt here."""
        try:
            deadline = self.desk.admit(session, request, time_left_s)
            if deadline is None:
                return
            self.scheduler.add(request, alone=source is None)
        except BatonError as error:
            self.desk.refuse(session, request.key, error)
            return
        self.desk.open(session, request, deadline, source)
        self._admit()

    def _admit(self) -> None:
        """Let in what fits. Blocks that became free may also be what a running sequence waits for: so the drive looks again."""
        if self._admitting is not None:
            self._admitting.cancel()
            self._admitting = None
        for admitted in self.scheduler.admit():
            entry = self.desk.get(admitted.request.key)
            assert entry is not None, "the scheduler knows only what is on the desk"
            if entry.facts is not None:
                entry.session.outbox.accepted.append(admitted.request.key)
                entry.session.flush()
                self.intake.begin(admitted, entry.facts, entry.deadline)
        self.drive.poke()

    def _admit_soon(self) -> None:
        """Let in what fits, once for all that end in this turn of the loop.

        When a router is lost that may be everybody, and who waits must not be let in only to be ended next.
        """
        if self._admitting is None:
            self._admitting = asyncio.get_running_loop().call_soon(self._admit)

    # What the intake says (see PullListener).

    def pulled(self, key: Key, final: FinalToken, facts: PullFacts) -> None:
        """The sequence joins the batch. Token 0 is decode's first event too, so that no death between the streams loses it."""
        entry = self.desk.get(key)
        assert entry is not None, "a pull whose sequence was given up is cancelled"
        entry.session.outbox.pulls.append(facts)
        self._deliver(self.scheduler.start(key, final.event(*key)))
        self.desk.flush()
        self._admit()

    def pull_failed(self, key: Key, error: BatonError) -> None:
        """The sequence is over, if it was not before, and its blocks are free.

        A cancel that did not come from here was some rank's on its way down: the router must hear of it, and try elsewhere.
        """
        if isinstance(error, Cancelled):
            error = NodeLost(f"the pull was cut off: {error.message}", stage="pull", node=self._name)
        self._end(key, error)
        self.scheduler.quiesced(key)
        self._admit_soon()

    def pull_lost(self, key: Key, error: BatonError) -> None:
        """The sequence is over, but its blocks stay in quarantine until the processes that may write them are gone: the node fails."""
        self._refuse(key, error)
        self.scheduler.cancel(key, quarantine=True)
        self.drive.fail(error)

    # What the drive asks (see Planner).

    def plan(self) -> Batch:
        """The next step's work; sequences of a router that does not read its events are left out."""
        batch = self.scheduler.plan(blocked=self.desk.backlogged())
        suspended = self.scheduler.take_suspended()
        if suspended:
            self.tell()  # first, or what the step before drew for them would be lost, and drawn again
        for key in suspended:
            self._end(key, self._suspended())
        return batch

    def apply(self, sampled: Sampled) -> None:
        """Take in what was drawn; `tell` says it."""
        self._untold.append(self.scheduler.apply(sampled))

    def tell(self) -> None:
        """Deliver what was drawn. What finished, or was cancelled during the step, makes room for what waits."""
        if not self._untold:
            return
        untold, self._untold = self._untold, []
        for applied in untold:
            self.desk.deliver_drawn(applied.drawn)
            for event in applied.events:
                self._deliver(event)
        for key in self.scheduler.take_failed():
            self._end(key, no_token("decode", self._name))
        self.desk.flush()
        self._admit()

    def _deliver(self, event: TokenEvent) -> None:
        if self.desk.deliver(event) and event.finish_reason:
            self.desk.forget((event.request_id, event.attempt))

    def _suspended(self) -> BatonError:
        return ResourceExhausted(
            f"suspended: all {self.pool.counts().total} blocks of {self._name} are in use",
            stage="decode",
            node=self._name,
            cause="suspended",
        )

    def _end(self, key: Key, error: BatonError) -> None:
        """End one attempt; blocks that a pull may still write are quarantined until it has ended."""
        if self._refuse(key, error):
            self.scheduler.cancel(key, quarantine=self.intake.cancel(key))
            self._admit_soon()

    def _refuse(self, key: Key, error: BatonError) -> bool:
        """Forget an attempt and tell its router why, unless it cancelled it; False if it is not on the desk (any more)."""
        entry = self.desk.get(key)
        if entry is None:
            return False
        if not isinstance(error, Cancelled):
            self.desk.refuse(entry.session, key, error)
        self.desk.forget(key)
        return True

    async def close(self, error: BatonError | None) -> None:
        """End everything; routers are told why."""
        self.tell()  # who has finished has, although it was not said yet
        self.desk.close(error)
        await self.intake.close()
        await self.client.close()
