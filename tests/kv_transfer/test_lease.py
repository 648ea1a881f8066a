"""The life of leases: every transition by example, the whole table against its rules by a state machine of random events."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.errors import BatonError, Cancelled, InternalError, InvalidRequest, LeaseLost, ResourceExhausted
from baton.request import FinishReason, TokenEvent, TokenLogprob
from kv_transfer.lease import LEASE_LIFE, Announced, FinalToken, Lease, LeaseEvent, LeaseState, LeaseTable

FINAL = FinalToken(0, 42)


def table(**changes: float) -> LeaseTable:
    return LeaseTable(**{"lease_s": 60.0, "handshake_s": 5.0, "tombstone_s": 600.0} | changes)


def complete(leases: LeaseTable, number: int = 1, blocks: tuple[tuple[int, int], ...] = ((7, 1), (8, 1))) -> None:
    leases.open(number, 0.0)
    leases.announce(number, 0, blocks, 0.0, FINAL)


def settled(leases: LeaseTable) -> list[tuple[int, LeaseState]]:
    return [(lease.number, lease.state) for lease in leases.take_settled()]


@pytest.mark.parametrize("state", LeaseState)
@pytest.mark.parametrize("event", LeaseEvent)
def test_only_drawn_transitions_happen(state: LeaseState, event: LeaseEvent) -> None:
    lease = Lease(1, state, math.inf)
    assert LEASE_LIFE.ends(state) is state.ended
    if LEASE_LIFE.allows(state, event):
        lease.apply(event)
        assert lease.state is LEASE_LIFE.table[state, event] and not state.ended
        assert (event is LeaseEvent.REWIND) <= (lease.state is LeaseState.OPEN)
    else:
        with pytest.raises(InternalError, match=event.value):
            lease.apply(event)


def test_a_pull_reads_and_releases() -> None:
    leases = table()
    leases.open(1, 0.0)
    leases.pull(1, 1, 0.0)
    assert leases.announce(1, 0, [(7, 70), (8, 80)], 1.0) and leases.announce(1, 2, [(9, 90)], 2.0, FINAL)
    lease = leases.get(1)
    assert lease and lease.announced_from(1) == Announced(1, (8, 9), (80, 90), FINAL)
    assert leases.release(1, 1, 3.0).state is LeaseState.RELEASED
    assert settled(leases) == [(1, LeaseState.RELEASED)] and settled(leases) == [] and len(leases) == 0


def test_a_pull_may_come_before_its_request_and_waits_for_it() -> None:
    leases = table()
    leases.pull(1, 1, 0.0)
    assert leases.next_deadline_s() == 5.0
    lease = leases.open(1, 4.0, request_deadline_s=100.0)
    assert lease.links == {1} and lease.deadline_s == 100.0


def test_a_request_that_never_comes_ends_the_pull_but_may_still_be_pulled_later() -> None:
    leases = table()
    leases.pull(1, 1, 0.0)
    assert [lease.number for lease in leases.expire(5.0)] == [1] and settled(leases) == []
    with pytest.raises(LeaseLost, match="expired"):
        leases.open(1, 5.5)
    leases.close(1, 1, 6.0)
    assert settled(leases) == [(1, LeaseState.EXPIRED)]
    assert leases.open(1, 7.0).state is LeaseState.OPEN


def test_a_higher_attempt_fences_and_its_release_waits_for_the_reads_of_the_lower() -> None:
    leases = table()
    complete(leases)
    leases.pull(1, 3, 1.0)
    leases.pull(1, 5, 2.0)
    with pytest.raises(LeaseLost, match="fenced by 5"):
        leases.release(1, 3, 3.0)
    for attempt in (4, 5):
        with pytest.raises(LeaseLost, match="fenced"):
            leases.pull(1, attempt, 3.0)
    leases.release(1, 5, 3.0)
    assert settled(leases) == []
    with pytest.raises(LeaseLost, match="released"):
        leases.pull(1, 6, 3.0)
    leases.close(1, 3, 4.0)
    assert settled(leases) == [(1, LeaseState.RELEASED)]


def test_a_release_needs_the_final_announcement_and_a_link() -> None:
    leases = table()
    leases.open(1, 0.0)
    leases.pull(1, 1, 0.0)
    with pytest.raises(InvalidRequest, match="open"):
        leases.release(1, 1, 1.0)
    with pytest.raises(LeaseLost, match="no open Pull"):
        leases.release(1, 2, 1.0)
    with pytest.raises(LeaseLost, match="no open Pull"):
        leases.release(2, 1, 1.0)


def test_expiry_counts_from_the_last_announcement_or_link_and_waits_for_the_link() -> None:
    leases = table()
    complete(leases)
    leases.pull(1, 1, 30.0)
    assert leases.next_deadline_s() == 90.0
    leases.close(1, 1, 50.0)
    assert leases.next_deadline_s() == 110.0 and leases.expire(109.0) == []
    leases.pull(1, 2, 109.0)
    assert leases.expire(169.0) and settled(leases) == [] and leases.next_deadline_s() == math.inf
    leases.close(1, 2, 170.0)
    assert settled(leases) == [(1, LeaseState.EXPIRED)]


def test_a_lease_never_outlives_its_request() -> None:
    leases = table()
    leases.open(1, 0.0, request_deadline_s=20.0)
    leases.announce(1, 0, [], 10.0, FINAL)
    assert leases.next_deadline_s() == 20.0


def test_only_a_lease_nobody_counts_on_is_revocable() -> None:
    leases = table()
    for number in (1, 2, 3):
        leases.open(number, 0.0)
    leases.accept(2)
    leases.accept(99)
    for number in (3, 5):
        leases.pull(number, 1, 0.0)
    leases.close(5, 1, 0.0)
    leases.accept(5)
    leases.open(5, 0.0)
    assert [leases.rewind(number) for number in (1, 2, 3, 4, 5)] == [True, False, False, False, True]
    leases.fail(1, Cancelled("x"), 1.0)
    assert not leases.rewind(1)


def test_a_lease_whose_reader_has_left_is_revocable_until_another_is_accepted() -> None:
    leases = table()
    leases.open(1, 0.0)
    leases.accept(1)
    for attempt in (1, 2):
        leases.pull(1, attempt, 0.0)
    leases.close(1, 2, 0.0)
    assert not leases.rewind(1), "the fenced one may still be reading"
    leases.close(1, 1, 0.0)
    assert leases.rewind(1)
    leases.accept(1)
    assert not leases.rewind(1)


def test_a_pull_that_cannot_be_leaves_nothing_behind() -> None:
    leases = table(max_links=2)
    with pytest.raises(InvalidRequest, match="from 1"):
        leases.pull(1, 0, 0.0)
    assert len(leases) == 0
    for attempt in (1, 2):
        leases.pull(1, attempt, 0.0)
    with pytest.raises(ResourceExhausted, match="2 Pulls"):
        leases.pull(2, 1, 0.0)
    assert len(leases) == 1
    leases.close(1, 1, 0.0)
    leases.close(1, 1, 0.0)
    leases.pull(2, 1, 0.0)
    assert leases.num_links == 2


def test_a_puller_cannot_have_more_blocks_than_there_are() -> None:
    leases = table()
    leases.open(1, 0.0)
    lease = leases.pull(1, 1, 0.0)
    leases.announce(1, 0, [(7, 1)], 0.0)
    assert lease.announced_from(5) == Announced(5, (), ()), "more may come"
    leases.announce(1, 1, [(8, 1)], 0.0, FINAL)
    assert lease.announced_from(2) == Announced(2, (), (), FINAL)
    with pytest.raises(InvalidRequest, match="3 blocks of a prompt of 2"):
        lease.announced_from(3)


def test_a_rewound_lease_starts_anew_under_its_number() -> None:
    leases = table(lease_s=10.0)
    leases.open(1, 0.0, request_deadline_s=100.0)
    leases.announce(1, 0, [(7, 1), (8, 1)], 1.0, FINAL)
    assert leases.next_deadline_s() == 11.0
    assert leases.rewind(1) and settled(leases) == []
    assert leases.next_deadline_s() == 100.0, "it expires like one that is still computed"
    lease = leases.pull(1, 1, 2.0)
    assert lease.state is LeaseState.OPEN and lease.announced_from(0) == Announced(0, (), ())
    assert leases.announce(1, 0, [(3, 5), (4, 5)], 3.0, FINAL)
    assert lease.announced_from(0) == Announced(0, (3, 4), (5, 5), FINAL)
    assert leases.release(1, 1, 4.0).state is LeaseState.RELEASED


def test_failure_is_told_to_links_and_remembered() -> None:
    leases = table()
    leases.open(1, 0.0)
    leases.pull(1, 1, 0.0)
    why = Cancelled("the client left")
    leases.fail(1, why, 1.0)
    leases.fail(1, InternalError("too late"), 1.0)
    lease = leases.get(1)
    assert lease and lease.error is why and lease.state is LeaseState.FAILED and settled(leases) == []
    leases.close(1, 1, 2.0)
    assert settled(leases) == [(1, LeaseState.FAILED)]


def test_a_cancel_of_an_unknown_number_refuses_what_comes_later_for_a_while() -> None:
    leases = table(tombstone_s=10.0)
    leases.fail(1, Cancelled("early"), 0.0)
    leases.fail(1, Cancelled("again"), 9.0)
    for call in (lambda: leases.open(1, 9.0), lambda: leases.pull(1, 1, 9.0), lambda: leases.release(1, 1, 9.0)):
        with pytest.raises(LeaseLost, match="failed"):
            call()
    assert leases.open(1, 10.0).state is LeaseState.OPEN


def test_tombstones_and_leases_are_bounded() -> None:
    leases = table(max_leases=2, max_tombstones=2)
    for number in (1, 2, 3):
        leases.fail(number, Cancelled("x"), 0.0)
    leases.open(1, 1.0)
    leases.pull(9, 1, 1.0)
    with pytest.raises(ResourceExhausted):
        leases.open(10, 1.0)
    with pytest.raises(LeaseLost):
        leases.open(3, 1.0)
    assert leases.numbers() == (1, 9)


def test_a_number_is_used_once() -> None:
    leases = table()
    leases.open(1, 0.0)
    with pytest.raises(InvalidRequest, match="in use"):
        leases.open(1, 0.0)


def test_the_final_token_is_the_same_event_at_both_ends() -> None:
    event = TokenEvent("r", 1, 0, (5,), (TokenLogprob(5, -0.5),), FinishReason.STOP)
    assert FinalToken.of(event).event("r", 1) == event
    assert FinalToken.of(TokenEvent("r", 1, 3, (5,))).event("r", 2) == TokenEvent("r", 2, 3, (5,))


class Leases(RuleBasedStateMachine):
    """Random events on a few numbers, in any order, against what must always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.table = LeaseTable(lease_s=20.0, handshake_s=5.0, tombstone_s=1e9, max_leases=6, max_links=5)
        self.opened: set[int] = set()
        self.ended: dict[int, LeaseState] = {}
        self.links: set[tuple[int, int]] = set()

    numbers = st.integers(1, 8)
    attempts = st.integers(0, 4)

    @rule(number=numbers)
    def open(self, number: int) -> None:
        if self.did(lambda: self.table.open(number, self.now_s, self.now_s + 50)):
            assert number not in self.opened, "a number is opened once"
            self.opened.add(number)

    @rule(number=numbers, attempt=attempts)
    def pull(self, number: int, attempt: int) -> None:
        if self.did(lambda: self.table.pull(number, attempt, self.now_s)):
            assert all(other < attempt for known, other in self.links if known == number)
            self.links.add((number, attempt))

    @rule(number=numbers, last=st.booleans())
    def announce(self, number: int, last: bool) -> None:
        lease = self.table.get(number)
        if lease and lease.state in (LeaseState.OPEN, LeaseState.RELEASED, LeaseState.FAILED):
            told = self.table.announce(number, len(lease.blocks), [(1, 1)], self.now_s, FINAL if last else None)
            assert told is (lease.state in (LeaseState.OPEN, LeaseState.COMPLETE))

    @rule(number=numbers, attempt=attempts)
    def release(self, number: int, attempt: int) -> None:
        if self.did(lambda: self.table.release(number, attempt, self.now_s)):
            self.links.remove((number, attempt))

    @rule(number=numbers, attempt=attempts)
    def close(self, number: int, attempt: int) -> None:
        self.table.close(number, attempt, self.now_s)
        self.links.discard((number, attempt))

    @rule(number=numbers)
    def accept(self, number: int) -> None:
        self.table.accept(number)

    @rule(number=numbers)
    def rewind(self, number: int) -> None:
        if self.table.rewind(number):
            lease = self.lease(number)
            assert number in self.opened and not any(known == number for known, _ in self.links)
            assert lease.state is LeaseState.OPEN and lease.announced_from(0) == Announced(0, (), ())
            assert lease.deadline_s == lease.request_deadline_s

    @rule(number=numbers)
    def fail(self, number: int) -> None:
        self.table.fail(number, Cancelled("x"), self.now_s)

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.table.expire(self.now_s)
        assert self.table.next_deadline_s() > self.now_s

    @invariant()
    def every_opened_lease_is_held_or_has_ended_once(self) -> None:
        self.take_settled()
        assert self.table.num_links == len(self.links) == sum(len(self.lease(number).links) for number in self.table.numbers())
        held = {number for number in self.table.numbers() if self.lease(number).opened}
        assert held | set(self.ended) == self.opened and not held & set(self.ended)
        assert len(self.table) <= 6

    def take_settled(self) -> None:
        for lease in self.table.take_settled():
            assert lease.state.ended and not any(number == lease.number for number, _ in self.links)
            if lease.opened:
                assert lease.number in self.opened and lease.number not in self.ended
                self.ended[lease.number] = lease.state

    def teardown(self) -> None:
        for number, attempt in tuple(self.links):
            self.close(number, attempt)
        self.wait(1000.0)
        self.take_settled()
        assert set(self.ended) == self.opened and len(self.table) == 0

    def lease(self, number: int) -> Lease:
        lease = self.table.get(number)
        assert lease
        return lease

    def did(self, call) -> bool:
        try:
            call()
        except BatonError as error:
            assert not isinstance(error, InternalError)
            return False
        return True


TestLeases = Leases.TestCase
