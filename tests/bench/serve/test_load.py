"""The open loop: arrivals do not wait for answers, a limit holds them back, what is due and what is sent is written down."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.serve.answers import Answer, Done
from bench.serve.asks import Ask
from bench.serve.load import Load


class Slow:
    """A backend without a server: every answer is one token after `takes_s`."""

    def __init__(self, takes_s: float) -> None:
        self.sent: list[str] = []
        self.most = 0
        self._takes_s = takes_s
        self._running = 0

    def prepare(self, ask: Ask, request_id: str) -> str:
        return request_id

    def send(self, prepared: str, answer: Answer, done: Done) -> None:
        self.sent.append(prepared)
        self._running += 1
        self.most = max(self.most, self._running)
        answer.sent_s = time.monotonic()
        asyncio.get_running_loop().call_later(self._takes_s, self._end, answer, done)

    def _end(self, answer: Answer, done: Done) -> None:
        self._running -= 1
        answer.token_s.append(time.monotonic())
        answer.end(time.monotonic())
        done(answer)

    async def models(self) -> list[str]:
        return ["slow"]

    async def close(self) -> None:
        return None


def asks(num: int) -> list[Ask]:
    return [Ask("x", 1, 1)] * num


async def test_arrivals_do_not_wait_for_answers():
    slow = Slow(0.3)
    answers = await Load(slow, asks(10), [0.01 * i for i in range(10)], None).run()
    assert slow.most == 10, "the first answer comes after the last request"
    assert slow.sent == [f"bench-{i}" for i in range(10)]
    assert all(answer.succeeded and answer.due_s == answer.arrival_s <= answer.sent_s for answer in answers)


async def test_a_limit_holds_back_and_the_wait_is_written_down():
    slow, told = Slow(0.05), list[Answer]()
    answers = await Load(slow, asks(9), [0.0] * 9, 3, told.append).run()
    assert slow.most == 3 and len(told) == 9
    ends = sorted(answer.end_s for answer in answers)
    for number, answer in enumerate(answers):
        assert answer.due_s == (answer.arrival_s if number < 3 else ends[number - 3]), "due when a slot became free"


async def test_stop_leaves_what_has_not_ended():
    slow = Slow(0.05)
    load = Load(slow, asks(50), [0.02 * i for i in range(50)], None)
    asyncio.get_running_loop().call_later(0.3, load.stop)
    answers = await load.run()
    assert 1 <= sum(answer.succeeded for answer in answers) < 50 and len(slow.sent) < 50
    assert [answer.ended for answer in answers] == sorted([answer.ended for answer in answers], reverse=True)


async def test_nothing_to_do():
    assert await Load(Slow(0), [], [], None).run() == []


def test_an_answer_ends_once_and_needs_a_token():
    answer = Answer(Ask("x", 1, 1), 0.0)
    answer.end(1.0)
    assert answer.error == "the server sent no token" and not answer.succeeded
    with pytest.raises(AssertionError):
        answer.end(2.0)
