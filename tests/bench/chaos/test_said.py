"""A difference between two answers is found and called what it is; an answer that failed is compared as far as it came."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos.said import Failed, Flaw, Piece, Said, Try, flaw_of

IDS = list(range(100, 120))
BROKEN = Failed("unavailable", "", "", "Socket closed", 503)


def said(token_ids: list[int], **more) -> Said:
    facts = {"text": "".join(map(chr, token_ids)), "finish_reason": "length", "prompt_tokens": 7, "completion_tokens": len(token_ids)}
    return Said(token_ids, **{**facts, **more})


def finished(found: Said) -> Try:
    return Try(0.0, 1.0, found)


def failed(found: Said) -> Try:
    return Try(0.0, 1.0, found, BROKEN)


@pytest.mark.parametrize(
    ("found", "flaw"),
    [
        (IDS, None),
        ([*IDS[:10], 1, 2, 3, 4, *IDS[14:]], Flaw.WRONG),
        (IDS[:10] + IDS[9:19], Flaw.DOUBLED),
        (IDS[:10] + IDS[5:15], Flaw.DOUBLED),
        (IDS[:10] + IDS[11:], Flaw.MISSING),
        (IDS[:19], Flaw.MISSING),
        ([], Flaw.MISSING),
        ([*IDS, 5], Flaw.WRONG),
    ],
)
def test_tokens(found, flaw):
    assert flaw_of(said(IDS), finished(said(found))) is flaw


def test_what_came_before_an_error_has_to_be_right():
    assert flaw_of(said(IDS), failed(said(IDS[:5], finish_reason=""))) is None
    assert flaw_of(said(IDS), failed(said([], text=""))) is None
    assert flaw_of(said(IDS), failed(said([*IDS[:5], 7]))) is Flaw.WRONG
    assert flaw_of(said(IDS), failed(said(IDS[:5], text="x"))) is Flaw.TEXT


def test_text_usage_and_logprobs_count_too():
    assert flaw_of(said(IDS), finished(said(IDS, text="x"))) is Flaw.TEXT
    assert flaw_of(said(IDS), finished(said(IDS, completion_tokens=21))) is Flaw.USAGE
    assert flaw_of(said(IDS), finished(said(IDS, finish_reason="stop"))) is Flaw.USAGE
    expected = said(IDS, logprobs=[-0.5] * 20)
    assert flaw_of(expected, finished(said(IDS, logprobs=[-0.5] * 19 + [-0.6]))) is Flaw.LOGPROBS
    assert flaw_of(expected, finished(said(IDS, logprobs=[-0.5] * 19))) is Flaw.LOGPROBS
    assert flaw_of(expected, finished(said(IDS, logprobs=[-0.50001] * 20))) is None
    assert flaw_of(expected, failed(said(IDS[:3], logprobs=[-0.5] * 3))) is None


@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=40), cut=st.data())
def test_every_change_of_tokens_is_a_flaw(ids, cut):
    at = cut.draw(st.integers(0, len(ids) - 1))
    for changed in ([*ids[:at], 10, *ids[at + 1 :]], ids[:at] + ids[at + 1 :], ids[: at + 1] + ids[at:]):
        assert flaw_of(said(ids), finished(said(changed))) in (Flaw.WRONG, Flaw.DOUBLED, Flaw.MISSING)
    assert flaw_of(said(ids), finished(said(list(ids)))) is None


def test_pieces_add_up():
    found = Said()
    found.add(Piece((1, 2), "ab", (-0.1, -0.2)), 1.0)
    found.add(Piece((3,), "c", (-0.3,), "length", 9, 3, ("prefill-0", "decode-1/0")), 2.5)
    assert found == Said([1, 2, 3], [1.0, 1.0, 2.5], "abc", [-0.1, -0.2, -0.3], "length", 9, 3, ("prefill-0", "decode-1/0"))


def test_errors_are_told_apart():
    assert BROKEN.broken and not BROKEN.refused
    assert not replace(BROKEN, stage="router").broken, "the router's own word is no broken connection"
    assert replace(BROKEN, cause="internal", status=500).broken
    assert replace(BROKEN, status=429, stage="admission").refused
