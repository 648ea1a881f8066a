"""The transfer thread runs what it is given in turn, and whatever waits for it ends when it does."""

import socket
import threading

import numpy as np
import pytest

from baton.deadline import Deadline
from baton.errors import BatonError, Cancelled, DeadlineExceeded, InternalError, InvalidRequest, LeaseLost, Unavailable
from kv_transfer.thread import READ, TransferThread
from kv_transfer.transport import Check, Span, Spans, Ticket

SOON = 5.0


def test_run_returns_raises_and_gives_up(thread: TransferThread) -> None:
    assert thread.run(lambda: 7, Deadline.after(SOON)) == 7
    with pytest.raises(InvalidRequest):
        thread.run(lambda: _raise(InvalidRequest("no")), Deadline.after(SOON))
    gate = threading.Event()
    thread.post(lambda: _wait(gate))
    with pytest.raises(DeadlineExceeded):
        thread.run(lambda: 7, Deadline.after(0.01))
    gate.set()


def test_timers_fire_in_order_unless_cancelled(thread: TransferThread) -> None:
    fired: list[int] = []
    done = threading.Event()

    def arm() -> None:
        thread.at(Deadline.after(0.02), lambda: (fired.append(2), done.set()))
        thread.at(Deadline.after(0.01), lambda: fired.append(1))
        thread.at(Deadline.after(0.01), lambda: fired.append(9)).cancel()

    thread.post(arm)
    assert done.wait(SOON) and fired == [1, 2]


def test_work_takes_turns(thread: TransferThread) -> None:
    steps: list[str] = []
    done = threading.Event()

    def job(name: str):
        for _ in range(3):
            steps.append(name)
            yield
        if name == "b":
            done.set()

    thread.post(lambda: (thread.work(job("a")), thread.work(job("b"))))
    assert done.wait(SOON) and steps == ["a", "b"] * 3


def test_a_socket_closed_by_another_of_the_same_batch_is_not_called(thread: TransferThread) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []
    done = threading.Event()

    def ready(index: int) -> None:
        called.append(index)
        for ours, _ in pairs:
            thread.unwatch(ours)
        done.set()

    def watch() -> None:
        for index, (ours, _) in enumerate(pairs):
            thread.watch(ours, READ, lambda _, index=index: ready(index))

    for _, theirs in pairs:
        theirs.send(b"x")
    thread.run(watch, Deadline.after(SOON))
    assert done.wait(SOON)
    thread.run(lambda: None, Deadline.after(SOON))
    assert len(called) == 1
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


def test_close_ends_what_waits_and_refuses_what_comes(no_leaks: None) -> None:
    thread = TransferThread()
    exits: list[BatonError] = []
    thread.run(lambda: thread.on_exit(exits.append), Deadline.after(SOON))
    ticket = thread.ticket()
    thread.close()
    thread.close()
    assert len(exits) == 1 and not thread.alive and not thread.post(lambda: None)
    for late in (ticket, thread.ticket()):
        with pytest.raises(Unavailable):
            late.wait(Deadline.after(SOON))
    with pytest.raises(Unavailable):
        thread.run(lambda: 7, Deadline.after(SOON))
    ticket.abort()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_on_the_thread_fails_every_read() -> None:
    thread = TransferThread()
    ticket = thread.ticket()
    thread.post(lambda: _raise(ZeroDivisionError("a bug")))
    with pytest.raises(InternalError, match="a bug"):
        ticket.wait(Deadline.after(SOON))
    thread.close()
    assert isinstance(thread.failure, InternalError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exit_that_fails_keeps_no_other_from_ending() -> None:
    thread = TransferThread()
    exits: list[BatonError] = []
    for call in (exits.append, lambda _: _raise(ZeroDivisionError("a bug")), exits.append):
        thread.run(lambda call=call: thread.on_exit(call), Deadline.after(SOON))
    ticket = thread.ticket()
    thread.close()
    with pytest.raises(Unavailable):
        ticket.wait(Deadline.after(SOON))
    assert len(exits) == 2


class Parts:
    """A ticket whose parts end when the test says so."""

    def __init__(self) -> None:
        self.ticket = Ticket(lambda call: call())
        self.stopped: list[tuple[int, BatonError]] = []

    def add(self, number: int) -> None:
        self.ticket.add_part(lambda error: self.stopped.append((number, error)))


def test_a_ticket_ends_with_its_last_part() -> None:
    parts = Parts()
    parts.add(1)
    parts.ticket.end_part(10)
    assert not parts.ticket.quiesced
    parts.add(2)
    parts.ticket.seal()
    assert not parts.ticket.poll()
    parts.ticket.end_part(5)
    assert parts.ticket.quiesced and parts.ticket.wait(Deadline.after(0)) == 15


def test_nothing_to_read_is_read_at_once() -> None:
    ticket = Ticket(lambda call: call())
    ticket.seal()
    assert ticket.wait(Deadline.after(0)) == 0


def test_a_failed_part_stops_the_others_and_the_first_error_counts() -> None:
    parts, first, second = Parts(), LeaseLost("first"), LeaseLost("second")
    parts.add(1)
    parts.add(2)
    parts.ticket.seal()
    parts.ticket.fail_part(first)
    assert parts.stopped == [(1, first), (2, first)] and not parts.ticket.quiesced
    parts.ticket.fail_part(second)
    assert parts.ticket.future.exception() is first


def test_an_abort_is_over_only_when_the_parts_are() -> None:
    parts = Parts()
    parts.add(1)
    parts.ticket.abort()
    parts.ticket.abort(LeaseLost("again"))
    parts.ticket.seal()
    parts.add(2)  # comes too late: is told at once
    assert [number for number, _ in parts.stopped] == [1, 2] and not parts.ticket.quiesced
    with pytest.raises(DeadlineExceeded):
        parts.ticket.wait(Deadline.after(0))
    parts.ticket.end_part(1)
    parts.ticket.fail_part(LeaseLost("x"))
    with pytest.raises(Cancelled):
        parts.ticket.wait(Deadline.after(0))
    parts.ticket.abort()


@pytest.mark.parametrize("span", [Span(0, 0, 0), Span(-1, 0, 5), Span(0, -1, 5), Span(96, 0, 5), Span(0, 46, 5)])
def test_spans_outside_of_a_buffer_are_refused(span: Span) -> None:
    with pytest.raises(InvalidRequest):
        Spans.of([Span(0, 0, 5), span]).check_within(100, 50)
    Spans.of([]).check_within(0, 0)
    Spans.of([Span(95, 45, 5)]).check_within(100, 50)


def test_a_stale_block_is_named() -> None:
    table = np.array([5, 6, 7], np.uint64)
    assert Check.of([2, 0], [7, 5]).stale_block(table) is None
    assert Check.of([2, 1], [7, 5]).stale_block(table) == 1
    assert Check.of([0, 3], [5, 5]).stale_block(table) == 3
    assert Check.of([-1], [7]).stale_block(table) == -1
    assert Check.of([], []).stale_block(table) is None


def _raise(error: Exception) -> None:
    raise error


def _wait(gate: threading.Event) -> None:
    assert gate.wait(SOON)
