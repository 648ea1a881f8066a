"""What a prefill node's leader does with requests: schedules them, tells decode what is readable, the router what was sampled.

Decisions are the scheduler's and the lease table's; this class carries them out. Knows no messages and no tensors.
"""

from __future__ import annotations

from baton.deadline import Deadline
from baton.engine.batch import Batch, Sampled
from baton.engine.blocks import BlockPool
from baton.errors import BatonError, Cancelled, LeaseLost
from baton.request import SequenceRequest, TokenEvent
from kv_transfer.lease import FinalToken, LeaseState
from kv_transfer.server import TransferService
from kv_transfer.transport import Export
from prefill_node.outcome import PrefillOutcome
from prefill_node.scheduler import PrefillScheduler
from ranks.desk import Desk, no_token
from ranks.drive import Drive
from ranks.facts import GroupHello
from ranks.seat import Seat
from ranks.session import GroupLoad, Key, Session


class PrefillLeader:
    """State owner: the leader's event loop. What it holds for a request hangs on its desk entry and its lease."""

    def __init__(self, host: Seat) -> None:
        config = host.plan.config
        self._host = host
        self._node = host.plan.node
        self.membership = config.membership
        # facts: the lease number, 0 if nobody will pull
        self.desk = Desk[int]("prefill", self._node, self._end, vocab_size=host.vocab_size)
        self.pool = BlockPool(host.num_blocks, config.block_size)
        self.scheduler = PrefillScheduler(
            self.pool,
            max_step_tokens=config.prefill.max_step_tokens,
            max_sequences=config.prefill.max_sequences,
            max_waiting=config.prefill.max_waiting,
            max_unaccepted=config.prefill.max_unaccepted,
            max_model_len=host.max_model_len,
        )
        self.transfer = TransferService(
            host.incarnation,
            on_ended=self._lease_ended,
            on_opened=self._pull_opened,
            on_closed=self._pull_closed,
            node=self._node,
            lease_s=config.transfer.lease_s,
            handshake_s=config.transfer.handshake_s,
            drain_s=config.transfer.read_s,
        )
        self.drive = Drive(host.step, host.wake_others, self, host.step_begun)
        self.exports: tuple[Export, ...] = ()  # of all ranks of the node, once they are up
        self._by_lease: dict[int, Key] = {}  # until the attempt is over

    # What the router asks.

    def hello(self) -> GroupHello:
        """Who this node is, and where its blocks can be read."""
        return self._host.hello(self._host.control_address, self.exports)

    def load(self) -> GroupLoad:
        """What the node carries now."""
        load = self.scheduler.load()
        return GroupLoad(
            waiting_sequences=load.waiting,
            running_sequences=load.running,
            waiting_tokens=load.waiting_tokens,
            blocks=self.pool.counts(),
            open_leases=load.leases,
            open_pulls=self.transfer.num_pulls,
            steps=self.drive.steps,
            step_seconds=self.drive.busy_s,
        )

    def prefill(self, session: Session, request: SequenceRequest, lease: int, time_left_s: float) -> None:
        """Queue a request, in the place of its earlier attempts; refusals go back as its error. A doubled message changes nothing."""
        try:
            deadline = self.desk.admit(session, request, time_left_s)
            if deadline is None:
                return
            self._take_in(request, lease, deadline)
        except BatonError as error:
            self.desk.refuse(session, request.key, error)
            return
        self.desk.open(session, request, deadline, lease)
        if lease:
            self._by_lease[lease] = request.key
        self.drive.poke()

    def _take_in(self, request: SequenceRequest, lease: int, deadline: Deadline) -> None:
        """The lease first: whoever pulls it already is told if there is no room for the request."""
        pulled = lease != 0 and self.transfer.open(lease, deadline)
        try:
            self.scheduler.add(request, lease)
        except BatonError as error:
            if lease:
                self.transfer.fail(lease, error)
            raise
        if pulled:
            self.scheduler.opened(lease)

    def accept(self, lease: int) -> None:
        """A decode group has reserved room for the lease's sequence."""
        self.scheduler.accept(lease)
        self.transfer.accept(lease)
        self.drive.poke()

    # What the drive asks (see Planner).

    def plan(self) -> Batch:
        """The next step's work. Leases revoked for it are rewound before anything else can run."""
        for lease in self.scheduler.make_room():
            rewound = self.transfer.rewind(lease)
            assert rewound, "the scheduler and the lease table disagree about who counts on a lease"
        return self.scheduler.plan()

    def apply(self, sampled: Sampled) -> None:
        """Deliver what was sampled, announce what became readable."""
        outcome = self.scheduler.apply(sampled)
        for event in outcome.events:
            self._deliver(event)
        for key in outcome.failed:
            self._end(key, no_token("prefill", self._node))
        self.desk.flush()
        self._announce(outcome)

    def tell(self) -> None:
        """Nothing is left to say: `apply` has said it, for the next plan may revoke what it announced."""

    def _deliver(self, event: TokenEvent) -> None:
        """A request that nobody will pull is over with its token."""
        key = (event.request_id, event.attempt)
        entry = self.desk.get(key)
        if entry is not None and self.desk.deliver(event) and entry.facts == 0:
            self.desk.forget(key)

    def _announce(self, outcome: PrefillOutcome) -> None:
        for announced in outcome.announcements:
            self.transfer.announce(announced.lease, announced.first_block, announced.blocks, _final(announced.final))
        for lease in outcome.ended:
            self._fail_ended(lease)

    def _fail_ended(self, lease: int) -> None:
        """The blocks are given up: a pull that still comes finds the lease gone, and the request's entry goes with it."""
        self.transfer.fail(lease, LeaseLost("the request ended with its first token", stage="prefill", node=self._node))

    # What happens to leases.

    def _pull_opened(self, lease: int) -> None:
        self.scheduler.opened(lease)
        self.drive.poke()

    def _pull_closed(self, lease: int) -> None:
        if self.scheduler.closed(lease):
            self._fail_ended(lease)
        self.drive.poke()

    def _lease_ended(self, lease: int, state: LeaseState) -> None:
        """Nobody reads the lease's blocks any more."""
        self.scheduler.release(lease)
        key = self._by_lease.pop(lease, None)
        entry = self.desk.get(key) if key else None
        if key and entry:
            if state is LeaseState.EXPIRED:
                error = LeaseLost("nobody read the blocks in time", stage="prefill", node=self._node)
                self.desk.refuse(entry.session, key, error)
            self.desk.forget(key, finished=state is LeaseState.RELEASED)
        self.drive.poke()

    def _end(self, key: Key, error: BatonError) -> None:
        """End one attempt. Blocks that a peer may still be reading are freed when its pull has closed, not here."""
        entry = self.desk.get(key)
        if entry is None:
            return
        if not isinstance(error, Cancelled):
            self.desk.refuse(entry.session, key, error)
        self._drop(key)
        if entry.facts:
            self.transfer.fail(entry.facts, error)
        self.drive.poke()

    def _drop(self, key: Key) -> None:
        entry = self.desk.get(key)
        assert entry is not None
        self.desk.forget(key)
        self._by_lease.pop(entry.facts, None)
        self.scheduler.cancel(*key)

    async def close(self, error: BatonError | None) -> None:
        """End everything; routers are told why."""
        self.transfer.close(self.desk.close(error))


def _final(event: TokenEvent | None) -> FinalToken | None:
    if event is None:
        return None
    logprob = event.logprobs[0] if event.logprobs else None
    return FinalToken(event.output_index, event.token_ids[0], logprob, event.finish_reason)
