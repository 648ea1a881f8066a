"""What a decode group's leader does with sequences: admits them, has their blocks pulled, runs them, tells the router.

Decisions are the scheduler's; this class carries them out. Knows no messages and no tensors.
"""

from __future__ import annotations

from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool
from baton.errors import BatonError, Cancelled, NodeLost, ResourceExhausted
from baton.request import SequenceRequest, TokenEvent
from decode_node.intake import Intake, PullSource
from decode_node.reader import GroupReader
from decode_node.scheduler import DecodeScheduler
from kv_transfer.client import PullClient
from kv_transfer.lease import FinalToken
from ranks.desk import Desk, no_token
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.seat import Seat
from ranks.session import GroupLoad, Key, PullFacts, Session


class DecodeLeader:
    """State owner: the leader's event loop. What it holds for a sequence hangs on its desk entry, its pull and the scheduler."""

    def __init__(self, host: Seat, reader: GroupReader) -> None:
        config = host.plan.config
        self._host = host
        self._name = f"{host.plan.node}/{host.plan.group}"
        self.desk = Desk[PullSource]("decode", self._name, self._end)  # facts: where the blocks are
        self.pool = BlockPool(host.num_blocks, config.block_size)
        self.scheduler = DecodeScheduler(
            self.pool,
            max_sequences=config.decode.max_sequences,
            max_waiting=config.decode.max_waiting,
            reserve_output_tokens=config.decode.reserve_output_tokens,
            max_model_len=host.max_model_len,
        )
        self.client = PullClient(handshake_s=config.transfer.handshake_s)
        self.intake = Intake(
            self.scheduler,
            self.client,
            reader,
            self._pulled,
            self._pull_failed,
            read_s=config.transfer.read_s,
            block_bytes=host.block_bytes,
        )
        self.drive = Drive(host.step, host.wake_others, self)

    # What the router asks.

    def hello(self) -> GroupHello:
        """Who this group is."""
        return self._host.hello()

    def load(self) -> GroupLoad:
        """What the group carries now."""
        load = self.scheduler.load()
        return GroupLoad(
            waiting_sequences=load.waiting,
            running_sequences=load.running + load.pulling,
            waiting_tokens=load.waiting_tokens,
            blocks=self.pool.counts(),
            open_leases=0,
            open_pulls=self.intake.num_open,
            steps=self.drive.steps,
            step_seconds=self.drive.busy_s,
        )

    def decode(self, session: Session, request: SequenceRequest, source: PullSource, time_left_s: float) -> None:
        """Queue a sequence, in the place of its earlier attempts; refusals go back as its error."""
        self.desk.cancel(request.request_id, request.attempt - 1, "a later attempt has come")
        try:
            self.desk.check_open()
            self.scheduler.add(request)
        except BatonError as error:
            self.desk.refuse(session, request.key, error)
            return
        self.desk.open(session, request.key, time_left_s, source)
        self._admit()

    def _admit(self) -> None:
        for admitted in self.scheduler.admit():
            key = (admitted.request_id, admitted.attempt)
            entry = self.desk.get(key)
            assert entry is not None, "the scheduler knows only what is on the desk"
            entry.session.outbox.accepted.append(key)
            entry.session.flush()
            self.intake.begin(admitted, entry.facts, entry.deadline)

    # What the intake says.

    def _pulled(self, key: Key, final: FinalToken, facts: PullFacts) -> None:
        entry = self.desk.get(key)
        if entry is None:  # given up while the last read was ending
            self._quiesced(key)
            return
        entry.session.outbox.pulls.append(facts)
        self._deliver(self.scheduler.start(key, _repeat(key, final)))
        self.desk.flush()
        self.drive.poke()
        self._admit()

    def _pull_failed(self, key: Key, error: BatonError) -> None:
        """The pull is over and nothing can land any more, whether or not the sequence had been given up before.

        A cancel that did not come from here was some rank's on its way down: the router must hear of it, and try elsewhere.
        """
        if isinstance(error, Cancelled):
            error = NodeLost(f"the pull was cut off: {error.message}", stage="pull", node=self._name)
        self._end(key, error)
        self._quiesced(key)

    def _quiesced(self, key: Key) -> None:
        self.scheduler.quiesced(key)
        self._admit()

    # What the drive asks (see Planner).

    def plan(self) -> Batch:
        """The next step's work; sequences of a router that does not read its events are left out."""
        batch = self.scheduler.plan(blocked=self.desk.backlogged())
        for key in self.scheduler.take_suspended():
            self._end(key, self._suspended())
        return batch

    def apply(self, sampled: Sampled) -> None:
        """Deliver what was drawn. What finished, or was cancelled during the step, makes room for what waits."""
        for event in self.scheduler.apply(sampled):
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
        entry = self.desk.get(key)
        if entry is None:
            return
        if not isinstance(error, Cancelled):
            self.desk.refuse(entry.session, key, error)
        self.desk.forget(key)
        self.scheduler.cancel(*key, quarantine=self.intake.cancel(key))
        self._admit()

    async def close(self, error: BatonError | None) -> None:
        """End everything; routers are told why."""
        self.desk.close(error)
        await self.intake.close()
        await self.client.close()


def _repeat(key: Key, final: FinalToken) -> TokenEvent:
    """Token 0 as decode's first event, so that no death between the streams loses it."""
    return TokenEvent(
        request_id=key[0],
        attempt=key[1],
        output_index=final.output_index,
        token_ids=(final.token_id,),
        logprobs=(final.logprob,) if final.logprob else (),
        finish_reason=final.finish_reason,
    )
