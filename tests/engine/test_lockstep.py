"""Sleep and wake of a lock-step domain: same epochs for all, nobody left behind, nobody steps for nothing."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.engine.lockstep import WakeState


class Domain:
    """Ranks driven the way a node drives them, with messages, work and finished steps in any order the test likes.

    A collective step happens once all ranks have joined it; each rank learns its outcome later, at a moment of its own.
    """

    def __init__(self, num_ranks):
        self.ranks = [WakeState() for _ in range(num_ranks)]
        self.work = [0] * num_ranks
        self.joined = [0] * num_ranks  # the step each rank is in or waits to take part in
        self.sizes = [0] * num_ranks  # what it brought to that step
        self.unseen = [[] for _ in self.ranks]  # outcomes of steps that a rank has not processed
        self.mail = []
        self.epoch = 0
        self.idle_steps = 0

    def join(self, rank):
        assert self.joined[rank] == self.ranks[rank].epoch, "one step at a time"
        self.joined[rank] += 1
        self.sizes[rank] = self.work[rank]
        if all(joined == self.epoch + 1 for joined in self.joined):
            self.run_step()

    def run_step(self):
        self.epoch += 1
        idle = not any(self.sizes)
        self.idle_steps += idle
        for rank, size in enumerate(self.sizes):
            self.work[rank] -= bool(size)
            self.unseen[rank].append((self.epoch, idle))

    def arrive(self, rank, amount):
        self.work[rank] += amount
        self.nudge(rank)

    def vanish(self, rank):
        """Work is cancelled; what a step has taken already runs to its end."""
        self.work[rank] = min(self.work[rank], 1 if self.sizes[rank] and self.joined[rank] > self.epoch else 0)

    def nudge(self, rank):
        epoch = self.ranks[rank].want_wake() if self.work[rank] else None
        if epoch is not None:
            self.mail += [(other, epoch) for other in range(len(self.ranks)) if other != rank]
            self.join(rank)

    def deliver(self, index):
        rank, epoch = self.mail.pop(index)
        if self.ranks[rank].on_wake(epoch):
            self.join(rank)

    def finish(self, rank):
        epoch, idle = self.unseen[rank].pop(0)
        if self.ranks[rank].on_step(epoch, idle):
            self.join(rank)
        else:
            self.nudge(rank)

    def moves(self):
        finishes = [("finish", rank) for rank, unseen in enumerate(self.unseen) if unseen]
        return finishes + [("deliver", i) for i in range(len(self.mail))]

    def move(self, choice):
        what, which = self.moves()[choice % len(self.moves())]
        self.finish(which) if what == "finish" else self.deliver(which)

    def asleep(self):
        return all(rank.asleep for rank in self.ranks)


EVENTS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(0, 3), st.integers(1, 3)),
    st.tuples(st.just("vanish"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 50), st.just(0)),
)


@given(st.integers(1, 4), st.lists(EVENTS, max_size=40), st.lists(st.integers(0, 50), min_size=8, max_size=8))
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_all_join_the_same_steps_and_nobody_waits_forever(num_ranks, events, order):
    domain = Domain(num_ranks)
    for what, which, amount in events:
        if what == "arrive":
            domain.arrive(which % num_ranks, amount)
        elif what == "vanish":
            domain.vanish(which % num_ranks)
        elif domain.moves():
            domain.move(which)
    quiet = domain.idle_steps
    turns = 0
    while domain.moves():
        domain.move(order[turns % len(order)])
        turns += 1
        assert turns < 2000, "they never fall asleep"
    assert domain.asleep()
    assert not any(domain.work), "somebody had work and nobody came"
    assert {rank.epoch for rank in domain.ranks} == set(domain.joined) == {domain.epoch}
    # Each idle step ends an awake phase; a last one, or two if work vanished before its step, ends the test.
    assert domain.idle_steps - quiet <= 2


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_one_idle_step_after_the_last_work(num_ranks, amount, rank):
    domain = Domain(num_ranks)
    domain.arrive(rank % num_ranks, amount)
    while domain.moves():
        domain.move(0)
    assert domain.epoch == amount + 1
    assert domain.idle_steps == 1


def test_a_rank_is_born_asleep():
    assert WakeState().asleep
    assert WakeState().epoch == 0


def test_stale_wakes_are_dropped():
    state = WakeState()
    assert state.on_wake(1)
    assert not state.on_wake(1), "it has joined already"
    assert state.want_wake() is None
    assert not state.on_step(1, all_idle=True)
    assert not state.on_wake(1), "that step is over"
    assert state.asleep


def test_a_wake_is_remembered_by_a_rank_that_two_steps_lie_behind():
    """A tensor-parallel leader's idle step is but a broadcast: it may end, and new work come, before the last rank has seen step 1 end."""
    state = WakeState()
    assert state.on_wake(1)
    assert not state.on_wake(3)
    assert state.on_step(1, all_idle=False)
    assert state.on_step(2, all_idle=True), "step 3 has begun elsewhere"
    assert not state.on_step(3, all_idle=True)


def test_a_wake_that_comes_while_still_finishing_is_remembered():
    state = WakeState()
    assert state.want_wake() == 1
    assert not state.on_wake(2)
    assert state.on_step(1, all_idle=True), "step 2 has begun elsewhere"
    assert not state.on_step(2, all_idle=True)
