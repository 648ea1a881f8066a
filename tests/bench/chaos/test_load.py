"""The clients of a run, against a real router over echo nodes: what they read, when they wait, when they ask again, how they misbehave."""

import asyncio
import os

import psutil
import pytest

from bench.chaos import stolen
from bench.chaos.asks import Ask, Door, draw
from bench.chaos.doors import Doors
from bench.chaos.faults import Fault, Kind, Record
from bench.chaos.guests import Guests
from bench.chaos.load import Load, attempt
from bench.chaos.run import Settings, undisturbed
from bench.chaos.said import flaw_of

DEADLINE_S = 30.0
TEXT = [ord("a") + number % 26 for number in range(2000)]
ASKED = draw(TEXT, 12, 6, (4, 9), 1)


def fault(kind: Kind, hold_s: float = 0.0) -> Fault:
    return Fault(0, kind, "", 0.5, 0.5, 0.0, hold_s, False)


async def test_both_doors_say_the_same(running):
    async with running() as (grpc, http), Doors(grpc, http) as doors:
        for number, prompt in enumerate([(97, 98, 99), tuple(range(97, 117))]):
            by_grpc, by_http = [
                await attempt(doors.stream(Ask(number, door, prompt, 6, num_logprobs=0), DEADLINE_S), DEADLINE_S) for door in Door
            ]
            assert by_grpc.finished and by_http.finished, (by_grpc.failed, by_http.failed)
            assert len(by_grpc.said.token_ids) == len(by_grpc.said.at_s) == len(by_grpc.said.logprobs) == 6
            assert by_grpc.said.finish_reason == "length" and by_grpc.said.prompt_tokens == len(prompt)
            assert "decode-0/0" in by_grpc.said.served_by
            assert flaw_of(by_grpc.said, by_http) is None


async def test_a_second_run_gives_the_same_answers(running):
    async with running() as (grpc, http):
        settings = Settings(grpc, http, 4, DEADLINE_S, True)
        told: list[int] = []
        one = await undisturbed(settings, ASKED.all, told.append)
        other = Load(grpc, http, ASKED.all, DEADLINE_S, lambda outcome: None)
        await other.allow(len(ASKED.all))
        await other.run(7)
    assert sorted(one) == [ask.number for ask in ASKED.all] and sum(told) == len(ASKED.all)
    assert not [
        flaw_of(one[outcome.ask.number], outcome.last) for outcome in other.outcomes if flaw_of(one[outcome.ask.number], outcome.last)
    ]


async def test_nothing_starts_before_it_may(running):
    async with running() as (grpc, http):
        load = Load(grpc, http, ASKED.asks, DEADLINE_S, lambda outcome: None)
        clients = asyncio.create_task(load.run(4))
        await load.allow(3)
        assert await load.started(3, 10)
        assert await load.quiet(10)
        assert not await load.started(4, 0.2)
        await load.hold()
        await load.allow(5)
        assert not await load.started(4, 0.2)
        await load.go()
        assert await load.started(5, 10)
        await load.allow(99)
        await asyncio.wait_for(clients, 20)
    assert sorted(outcome.ask.number for outcome in load.outcomes) == list(range(12))


async def test_a_refused_request_is_sent_again(running):
    async with running(step_s=0.01, max_running=1, max_queue=0) as (grpc, http):
        load = Load(grpc, http, ASKED.asks[:4], DEADLINE_S, lambda outcome: None)
        await load.allow(4)
        await load.run(4)
    assert all(outcome.last.finished for outcome in load.outcomes)
    refusals = [tried.failed for outcome in load.outcomes for tried in outcome.tries[:-1]]
    assert refusals and all(failed.refused for failed in refusals)


@pytest.mark.parametrize("door", Door)
async def test_a_request_whose_connection_broke_is_sent_again(running, door):
    async with running(step_s=0.02) as (grpc, http):
        load = Load(grpc, http, [Ask(0, door, (97, 98, 99), 40)], DEADLINE_S, lambda outcome: None)
        clients = asyncio.create_task(load.run(1))
        await load.allow(1)
        assert await load.started(1, 10)
        await asyncio.sleep(0.3)
        await load.hold()
        assert await asyncio.to_thread(cut_ours, grpc if door is Door.GRPC else http)
        assert await load.quiet(20)
        await load.go()
        await asyncio.wait_for(clients, 20)
    (outcome,) = load.outcomes
    first, last = outcome.tries
    assert first.failed.broken and 0 < len(first.said.token_ids) < 40
    assert last.finished and flaw_of(last.said, first) is None


def cut_ours(address: str) -> bool:
    """Cut this process's connections to address, which it serves itself."""
    found = [end for end in psutil.Process().net_connections("tcp") if end.status == "ESTABLISHED"]
    ours = [end for end in found if end.raddr.port == int(address.rpartition(":")[2])]
    return all(stolen.cut(stolen.Connection(os.getpid(), end.fd, "", "", tuple(end.laddr), tuple(end.raddr))) for end in ours)


async def test_a_burst_is_answered(running):
    async with running() as (grpc, http):
        guests, record = Guests(grpc, http, ASKED.burst, DEADLINE_S), Record(fault(Kind.FULL), 0.0)
        await guests.fill(fault(Kind.FULL), record)
    assert len(guests.asked) == 6 and all(outcome.last.finished for outcome in guests.asked)
    assert record.note == "6 finished, 0 refused and sent again"


async def test_clients_leave(running):
    async with running(step_s=0.005) as (grpc, http):
        guests, record = Guests(grpc, http, ASKED.burst, DEADLINE_S), Record(fault(Kind.LEAVE), 0.0)
        await guests.leave(fault(Kind.LEAVE), record)
    assert [outcome.last.failed.cause for outcome in guests.bad] == ["left"] * 4
    assert all(len(outcome.last.said.token_ids) < outcome.ask.max_tokens for outcome in guests.bad)


async def test_a_slow_client_is_cut_off_and_a_patient_one_is_not(running):
    """The answer is larger than all buffers between router and client."""
    burst = [Ask(0, Door.HTTP, tuple(TEXT[:20]), 1500)]
    async with running(slow_client_s=0.5) as (grpc, http):
        slow = Guests(grpc, http, burst, DEADLINE_S)
        await slow.read_slowly(fault(Kind.SLOW, 3.0), cut_off := Record(fault(Kind.SLOW), 0.0))
    async with running(slow_client_s=20.0) as (grpc, http):
        patient = Guests(grpc, http, burst, DEADLINE_S)
        await patient.read_slowly(fault(Kind.SLOW, 1.0), went_on := Record(fault(Kind.SLOW), 0.0))
    assert cut_off.note.startswith("cut off after") and slow.bad[0].last.failed is not None
    assert went_on.note.startswith("finished after 1500 of 1500 tokens") and patient.bad[0].last.finished
