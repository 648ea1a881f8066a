"""Promises are judged from what came: every way to break one is found, and what is excused is not held against anybody."""

from dataclasses import replace

import pytest

from bench.chaos.asks import Ask, Door
from bench.chaos.faults import Fault, Kind, Record
from bench.chaos.judge import Findings, Seen, doubts, judged
from bench.chaos.said import Failed, Outcome, Said, Try

DEADLINE_S = 60.0
GONE = Failed("unavailable", "", "", "Socket closed", 503)
FULL = Failed("queue_full", "admission", "", "full", 429, 1.0)
LOST = Failed("node_lost", "decode", "decode-0", "decode-0 is gone", 503)


def fault(number: int, kind: Kind, target: str = "") -> Fault:
    return Fault(number, kind, target, 0.5, 0.5, 0.0, 0.0, False)


def ask(number: int) -> Ask:
    return Ask(number, Door.GRPC, (1, 2, 3), 4)


def answer(*at_s: float, **more) -> Said:
    ids = list(range(len(at_s)))
    facts = {"finish_reason": "length", "prompt_tokens": 3, "completion_tokens": len(ids), "served_by": ("prefill-0", "decode-0/0")}
    return Said(ids, list(at_s), **{**facts, **more})


EXPECTED = answer(0.1, 0.2, 0.3, 0.4)


def seen(*tries: Try, **more) -> Seen:
    """A run with one request that had these tries."""
    outcomes = (Outcome(ask(0), tries),) if tries else ()
    facts = Seen({0: EXPECTED}, outcomes, (), 1, (), (), (), {}, DEADLINE_S, None, True)
    return replace(facts, **more)


def broken(found: Findings) -> list[str]:
    return [promise.says for promise in found.promises if not promise.holds]


def ok(began_s: float = 0.0, *at_s: float) -> Try:
    times = at_s or tuple(began_s + x for x in (0.1, 0.2, 0.3, 0.4))
    return Try(began_s, times[-1], answer(*times))


def test_nothing_wrong():
    found = judged(seen(ok()))
    assert found.passed and found.num_requests == found.num_finished == 1
    assert not found.flaws and not found.errors and not found.rows


@pytest.mark.parametrize(
    ("run", "promise"),
    [
        (seen(Try(0.0, 63.0, answer(0.1), silent=True)), "every request ended"),
        (seen(), "every request ended"),
        (seen(ok(0.0, 1.0, 1.1, 1.2, 62.5)), "past its deadline"),
        (seen(Try(0.0, 1.0, answer(0.1), LOST)), "every request finished"),
        (seen(Try(0.0, 1.0, answer(0.1), LOST)), "no error but"),
        (seen(Try(0.0, 1.0, answer(0.1), GONE), ok(2.0)), "no error but"),
        (seen(Try(0.0, 1.0, answer(0.1, 0.2, 0.3))), "answer differs"),
        (seen(ok(), leaks=("at the end: decode-0/0: 3 held",)), "was left"),
        (seen(ok(), unbalanced=("prefill-0",)), "added up"),
        (seen(ok(), records=(Record(fault(0, Kind.CUT), 0.0, broken="not proven"),)), "in service again"),
        (seen(ok(), records=(Record(fault(0, Kind.STOP, "decode-0/0"), 0.0, survived=True),)), "stopped ranks"),
    ],
)
def test_a_broken_promise_is_found(run, promise):
    found = judged(run)
    assert not found.passed
    assert any(promise in says for says in broken(found)), broken(found)


def test_the_routers_death_excuses_what_broke_then_and_nothing_else():
    death = Record(fault(0, Kind.ROUTER), 10.0, "router", whole_s=8.0)
    struck = Try(9.0, 10.1, answer(9.1, 9.2), GONE)
    found = judged(seen(struck, ok(19.0), records=(death,)))
    assert found.passed and found.num_excused == 1 and found.errors
    assert not judged(seen(Try(9.0, 9.5, answer(9.1), GONE), ok(19.0), records=(death,))).passed, "it broke before"
    assert not judged(seen(Try(30.0, 30.5, answer(30.1), GONE), ok(31.0), records=(death,))).passed, "long after"
    assert not judged(seen(replace(struck, failed=LOST), ok(19.0), records=(death,))).passed, "a node's loss is the router's to hide"
    assert not judged(seen(struck, records=(death,))).passed, "in the end it has to finish"


def test_a_refusal_is_no_error():
    found = judged(seen(Try(0.0, 0.1, Said(), FULL), ok(1.0)))
    assert found.passed and found.num_refused == 1


def test_bad_clients_are_owed_right_tokens_only():
    left = Outcome(ask(0), (Try(0.0, 1.0, answer(0.1, 0.2), Failed("left", "client", "", "", 499)),))
    assert judged(seen(ok(), bad=(left,))).passed
    changed = Said([0, 9], [0.1, 0.2])
    assert not judged(seen(ok(), bad=(Outcome(ask(0), (Try(0.0, 1.0, changed, GONE),)),))).passed


def test_as_many_answers_may_differ_as_did_undisturbed():
    """Where two undisturbed runs differ, and then as many more as chance explains; of one request all tries count once."""
    wrong = Try(0.0, 0.4, Said([0, 1, 9, 8], [0.1] * 4, finish_reason="length", prompt_tokens=3, completion_tokens=4))
    assert not judged(seen(wrong)).passed
    assert not judged(seen(wrong, num_differing=0)).passed
    assert judged(seen(wrong, num_differing=1)).passed
    many = replace(seen(), outcomes=tuple(Outcome(ask(0), (wrong, wrong)) for _ in range(3)), num_asked=3, num_differing=0)
    assert [promise.broken for promise in judged(many).promises if "differ" in promise.says] == [1]


def killed(at_s: float, **more) -> Record:
    return Record(fault(0, Kind.KILL, "decode-0/0"), at_s, "decode-0/0", whole_s=9.0, **more)


def test_a_pause_counts_for_the_fault_that_it_covers():
    paused = ok(0.0, 0.1, 0.2, 4.7, 4.8)
    found = judged(seen(paused, records=(killed(1.0),)))
    (row,) = found.rows
    assert (row.label, row.num, row.num_struck, row.limit_s) == ("kill decode", 1, 1, 3.0)
    assert row.pause_longest_s == pytest.approx(4.5) and row.whole_median_s == 9.0
    assert any("after kill decode" in says for says in broken(found))
    assert "4.50 s, request 0, after kill decode (decode-0/0)" in found.longest[0]
    assert judged(seen(paused, records=(killed(1.0),), timed=False)).passed
    assert judged(seen(paused, records=(killed(1.0, alone=True),))).passed, "no second node was there to go on with"
    assert judged(seen(paused, records=(killed(5.0),))).passed, "the pause was over by then"


def test_a_pause_with_two_faults_in_it_is_not_held_against_one():
    paused = ok(0.0, 0.1, 0.2, 4.7, 4.8)
    other = Record(fault(1, Kind.CUT), 2.0, "somewhere")
    assert judged(seen(paused, records=(killed(1.0), other))).passed


def test_the_wait_for_the_first_token_is_counted_apart():
    found = judged(seen(ok(0.0, 5.0, 5.1, 5.2, 5.3), records=(killed(1.0),)))
    (row,) = found.rows
    assert row.first_longest_s == 5.0 and row.pause_longest_s == 0.0 and found.passed


def test_a_stream_that_went_on_elsewhere_is_resumed():
    moved = Try(0.0, 0.4, answer(0.1, 0.2, 0.3, 0.4, served_by=("prefill-0", "decode-0/0", "decode-1/0")))
    assert judged(seen(moved)).num_resumed == 1
    assert judged(seen(ok())).num_resumed == 0


def test_a_fault_that_could_not_be_done_is_counted_as_skipped():
    found = judged(seen(ok(), records=(Record(fault(0, Kind.CUT), 0.2, skipped="no connection"),)))
    (row,) = found.rows
    assert (row.num, row.num_skipped) == (0, 1)


def test_a_difference_that_means_nothing_is_not_held_against_anybody():
    run = seen(Try(0.0, 0.4, Said([0, 1, 9, 8], [0.1] * 4, finish_reason="length", prompt_tokens=3, completion_tokens=4)))
    (doubt,) = doubts(run)
    assert (doubt.before, doubt.expected, doubt.found) == ((0, 1), 2, 9)
    found = judged(replace(run, ties=frozenset([doubt])))
    assert found.passed and found.num_ties == 1
    assert not judged(replace(run, ties=frozenset([replace(doubt, found=8)]))).passed
    assert not doubts(seen(ok())) and not doubts(seen(Try(0.0, 1.0, answer(0.1), GONE)))
