"""Who asked for what: late, doubled and foreign messages about attempts, and what is left when a router goes."""

import asyncio

import pytest

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, InvalidRequest, NodeLost, ResourceExhausted, Unavailable
from baton.request import Drawn, FinishReason, Sampling, SequenceRequest, TokenEvent
from ranks.desk import MAX_ROUTERS, MAX_TOMBSTONES, Desk
from ranks.session import MAX_BACKLOG, MAX_UNREAD, Key, Session
from tests.relay.inprocess import eventually

VOCAB = 100


class Role:
    """A role that does nothing for its attempts but end them."""

    def __init__(self) -> None:
        self.desk = Desk[str]("decode", "decode-0/1", self._end, vocab_size=VOCAB)
        self.ended: list[tuple[Key, BatonError]] = []

    def _end(self, key: Key, error: BatonError) -> None:
        entry = self.desk.get(key)
        assert entry is not None
        self.desk.refuse(entry.session, key, error)
        self.desk.forget(key)
        self.ended.append((key, error))

    def router(self, name: bytes = b"r") -> Session:
        session = Session(name * 16)
        self.desk.attach(session)
        return session

    def asks(self, session: Session, request_id: str = "a", attempt: int = 1, **more: object) -> bool:
        """Whether an attempt was started."""
        request = ask(request_id, attempt, **more)
        deadline = self.desk.admit(session, request, 60.0)
        if deadline is not None:
            self.desk.open(session, request, deadline, "facts")
        return deadline is not None


def ask(request_id: str = "a", attempt: int = 1, prompt: tuple[int, ...] = (1, 2), emitted: tuple[int, ...] = ()) -> SequenceRequest:
    return SequenceRequest(request_id, attempt, prompt, Sampling(max_tokens=8), emitted)


@pytest.fixture
async def role() -> Role:
    return Role()


def causes(session: Session) -> list[tuple[Key, str]]:
    return [(key, error.cause) for key, error in session.outbox.errors]


async def test_a_later_attempt_takes_the_place_of_the_earlier_and_a_late_earlier_one_is_refused(role: Role) -> None:
    router = role.router()
    assert role.asks(router, attempt=2) and role.asks(router, attempt=5)
    assert [key for key, _ in role.ended] == [("a", 2)]
    with pytest.raises(Cancelled, match="up to 5"):
        role.asks(router, attempt=3)
    assert role.desk.get(("a", 5)) and len(role.desk) == 1


async def test_a_doubled_message_starts_nothing_and_ends_nothing(role: Role) -> None:
    router = role.router()
    assert role.asks(router)
    assert not role.asks(router)
    assert not role.ended and len(role.desk) == 1


@pytest.mark.parametrize("known", [False, True])
async def test_a_cancel_that_overtakes_its_request_wins(role: Role, known: bool) -> None:
    router = role.router()
    if known:
        role.asks(router, attempt=1)
    role.desk.cancel(router, "a", 3, "enough")
    assert [key for key, _ in role.ended] == ([("a", 1)] if known else [])
    for attempt in (2, 3):
        with pytest.raises(Cancelled, match="up to 3"):
            role.asks(router, attempt=attempt)
    role.desk.cancel(router, "a", 1, "late")
    with pytest.raises(Cancelled):
        role.asks(router, attempt=3)
    assert role.asks(router, attempt=4)


async def test_the_number_of_cancels_that_are_remembered_is_bounded(role: Role) -> None:
    router = role.router()
    for number in range(MAX_TOMBSTONES + 1):
        role.desk.cancel(router, f"{number}", 1, "")
    assert role.asks(router, "0") and len(role.desk) == 1
    with pytest.raises(Cancelled):
        role.asks(router, "1")


async def test_two_routers_may_use_the_same_names_and_do_not_end_each_others_attempts(role: Role) -> None:
    """A restarted router, whose predecessor has not been given up yet, is told to come back and not that its client is wrong."""
    old, new = role.router(b"o"), role.router(b"n")
    role.asks(old)
    with pytest.raises(Unavailable, match="another router") as later:
        role.asks(new)
    assert later.value.retryable and later.value.retry_after_s
    role.desk.cancel(new, "a", 7, "not mine")
    role.desk.check(new, "a", 1)
    assert not role.ended and causes(new) == [(("a", 1), "unknown_attempt")]
    role.desk.detach(old)
    assert [key for key, _ in role.ended] == [("a", 1)]
    assert role.asks(new, attempt=8)
    with pytest.raises(Cancelled):
        role.asks(new, "a", attempt=7)


async def test_a_router_that_goes_takes_with_it_what_is_its_own(role: Role) -> None:
    one, other = role.router(b"1"), role.router(b"2")
    role.asks(one, "a")
    role.asks(other, "b")
    role.asks(one, "c")
    role.desk.detach(one)
    role.desk.detach(one)
    assert [key for key, _ in role.ended] == [("a", 1), ("c", 1)] and len(role.desk) == 1
    assert all(isinstance(error, Cancelled) for _, error in role.ended)


async def test_an_earlier_stream_of_the_same_router_is_over(role: Role) -> None:
    earlier = role.router()
    role.asks(earlier)
    later = role.router()
    assert earlier.closed and not later.closed and len(role.ended) == 1
    role.asks(later, "b")
    role.desk.detach(earlier)  # its stream hears of it at last
    assert len(role.desk) == 1


async def test_routers_are_not_without_number(role: Role) -> None:
    for number in range(MAX_ROUTERS):
        role.router(bytes([number]))
    with pytest.raises(ResourceExhausted, match="64 routers"):
        role.router(b"\xff")
    role.router(bytes([3]))


async def test_a_check_tells_how_far_an_attempt_is_also_when_it_has_ended_well(role: Role) -> None:
    router = role.router()
    role.asks(router, "going", emitted=(5, 6))
    role.asks(router, "finished")
    role.asks(router, "released")
    role.asks(router, "failed")
    role.desk.deliver(TokenEvent("finished", 1, 0, (7, 8), finish_reason=FinishReason.STOP))
    role.desk.forget(("finished", 1))
    role.desk.deliver(TokenEvent("released", 1, 0, (7,)))
    role.desk.forget(("released", 1), finished=True)
    role.desk.forget(("failed", 1))
    for name in ("going", "finished", "released", "failed"):
        role.desk.check(router, name, 1)
    assert router.outbox.known == [("going", 1, 2), ("finished", 1, 2), ("released", 1, 1)]
    assert causes(router) == [(("failed", 1), "unknown_attempt")]


async def test_tokens_of_an_attempt_that_is_over_go_nowhere(role: Role) -> None:
    router = role.router()
    assert not role.desk.deliver(TokenEvent("a", 1, 0, (7,)))
    role.desk.flush()
    assert not len(router.outbox)


async def test_drawn_tokens_go_to_the_router_of_each_attempt_that_is_still_here(role: Role) -> None:
    one, other = role.router(b"1"), role.router(b"2")
    role.asks(one, "a")
    role.asks(other, "b", emitted=(5,))
    role.asks(one, "c")
    drawn = Drawn(["a", "b", "gone", "c", "a"], [1, 1, 1, 9, 2], [0, 1, 0, 0, 0], [6, 7, 8, 9, 10])
    role.desk.deliver_drawn(drawn)
    assert list(one.outbox.drawn.rows()) == [("a", 1, 0, 6)] and list(other.outbox.drawn.rows()) == [("b", 1, 1, 7)]
    assert len(one.outbox) == one.outbox.num_tokens == 1
    role.desk.flush()
    role.desk.check(one, "a", 1)
    role.desk.check(other, "b", 1)
    assert (one.outbox.known, other.outbox.known) == ([("a", 1, 1)], [("b", 1, 2)])
    assert len((await one.take(0.1)).drawn) == 1


@pytest.mark.parametrize(
    ("request_", "why"),
    [(ask(prompt=(1, VOCAB)), "id 100 is beyond"), (ask(emitted=(VOCAB + 5,)), "id 105 is beyond"), (ask(attempt=0), "from 1")],
)
async def test_what_the_model_cannot_run_is_refused(role: Role, request_: SequenceRequest, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        role.desk.admit(role.router(), request_, 60.0)


async def test_an_attempt_ends_by_its_deadline(role: Role) -> None:
    router = role.router()
    role.desk.open(router, ask(), Deadline.after(0.02), "facts")
    await eventually(lambda: bool(role.ended), "the deadline")
    assert isinstance(role.ended[0][1], DeadlineExceeded)


async def test_a_closed_group_takes_nobody_and_nothing(role: Role) -> None:
    router = role.router()
    role.asks(router)
    reason = role.desk.close(None)
    assert isinstance(reason, NodeLost) and role.ended == [(("a", 1), reason)] and router.closed
    for late in (lambda: role.asks(router, "b"), lambda: role.router(b"x")):
        with pytest.raises(NodeLost, match="shutting down"):
            late()


async def test_attempts_of_a_router_that_does_not_read_are_named(role: Role) -> None:
    slow, other = role.router(b"s"), role.router(b"o")
    role.asks(slow, "a")
    role.asks(other, "b")
    assert role.desk.backlogged() == frozenset()
    slow.outbox.tokens.append(TokenEvent("a", 1, 0, (7,)))
    role.desk.deliver_drawn(Drawn(["a"] * MAX_BACKLOG, [1] * MAX_BACKLOG, list(range(1, MAX_BACKLOG + 1)), [7] * MAX_BACKLOG))
    assert role.desk.backlogged() == {("a", 1)}


async def test_a_broken_session_keeps_nothing_more_and_says_so(role: Role) -> None:
    router = role.router()
    watching = asyncio.create_task(router.until_broken(60.0))
    for number in range(MAX_UNREAD + 1):
        role.desk.check(router, "a", number)
    with pytest.raises(ResourceExhausted, match="unread"):
        await watching
    role.desk.check(router, "a", 1)
    assert not len(router.outbox)
