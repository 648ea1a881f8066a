"""Every broken promise is seen for what it is: each test breaks one."""

import pytest

from baton.errors import Cancelled, DeadlineExceeded, InternalError, ResourceExhausted, Unavailable
from baton.request import Chunk, FinishReason, Sampling, TokenLogprob, Usage
from simulator.engine import Violation
from simulator.invariants import GRACE_S, ChoiceRecord, Record
from simulator.model import answer

PROMPT = [1, 2, 3]
EXPECTED = answer(PROMPT, Sampling(max_tokens=4, temperature=0.0))


def record(timeout_s: float = 10.0, **facts) -> Record:
    given = {"roomy": False, "sure": True, "tokenless": False, **facts}
    return Record("request 0", 100.0, timeout_s, [ChoiceRecord(EXPECTED, logprobs=False)], len(PROMPT), **given)


def chunk(first: int, end: int, **facts) -> Chunk:
    return Chunk("request-0", 0, EXPECTED.text[first:end], EXPECTED.token_ids[first:end], **facts)


LAST = {"finish_reason": FinishReason.LENGTH, "usage": Usage(3, 4, 0)}


def test_a_whole_answer_is_right():
    seen = record()
    seen.take(chunk(0, 1))
    seen.take(chunk(1, 3))
    seen.take(chunk(3, 4, **LAST))
    seen.end(101.0, None, gave_up=False)
    assert seen.outcome == "finished"


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(0, 2), chunk(1, 3)],  # a token twice
        [chunk(0, 1), chunk(2, 3)],  # a gap
        [chunk(0, 3, finish_reason=FinishReason.LENGTH)],  # too short
        [chunk(0, 4, finish_reason=FinishReason.STOP)],  # for another reason
        [chunk(0, 4, **LAST), chunk(0, 0)],  # more after the end
        [chunk(0, 4, finish_reason=FinishReason.LENGTH, usage=Usage(3, 5, 0))],
        [Chunk("request-0", 0, "?", EXPECTED.token_ids[:1])],  # other text
    ],
)
def test_a_wrong_answer_is_seen(chunks):
    seen = record()
    with pytest.raises(Violation):
        for item in chunks:
            seen.take(item)


def test_wrong_logprobs_are_seen():
    seen = ChoiceRecord(EXPECTED, logprobs=True)
    with pytest.raises(Violation, match="logprobs"):
        seen.take(chunk(0, 1, logprobs=(TokenLogprob(EXPECTED.token_ids[0], -0.5),)))


def test_a_stream_that_ends_early_is_seen():
    seen = record()
    seen.take(chunk(0, 2))
    with pytest.raises(Violation, match="not whole"):
        seen.end(101.0, None, gave_up=False)


def test_a_second_end_is_seen():
    seen = record()
    seen.end(110.0, DeadlineExceeded("late"), gave_up=False)
    with pytest.raises(Violation, match="second end"):
        seen.end(110.0, DeadlineExceeded("late"), gave_up=False)


@pytest.mark.parametrize(
    ("error", "at_s", "facts"),
    [
        (DeadlineExceeded("x"), 110.0, {}),
        (Cancelled("x", cause="slow_client"), 105.0, {"stalled": True}),
        (ResourceExhausted("x"), 100.1, {}),
        (Unavailable("x", cause="no_nodes"), 109.0, {}),
        (Unavailable("x"), 101.0, {"excused": True}),
        (InternalError("x", cause="logits"), 101.0, {"tokenless": True}),
    ],
)
def test_some_errors_may_be_told(error, at_s, facts):
    record(**facts).end(at_s, error, gave_up=False)


@pytest.mark.parametrize(
    ("error", "at_s", "num_tokens", "facts"),
    [
        (DeadlineExceeded("x"), 105.0, 0, {}),  # early
        (DeadlineExceeded("x"), 110.1 + GRACE_S, 0, {}),  # late
        (DeadlineExceeded("x"), 160.0, 0, {"timeout_s": 60.0}),  # there was time enough
        (InternalError("x"), 101.0, 0, {}),
        (ResourceExhausted("x"), 101.0, 2, {}),  # after the first token
        (ResourceExhausted("x"), 101.0, 0, {"roomy": True}),
        (Unavailable("x", cause="no_nodes"), 101.0, 2, {}),
        (Unavailable("x"), 101.0, 0, {}),
        (Cancelled("x", cause="slow_client"), 105.0, 0, {}),
    ],
)
def test_other_errors_may_not(error, at_s, num_tokens, facts):
    seen = record(**facts)
    if num_tokens:
        seen.take(chunk(0, num_tokens))
    with pytest.raises(Violation):
        seen.end(at_s, error, gave_up=False)


def test_silence_until_the_client_gives_up_is_seen():
    with pytest.raises(Violation, match="no answer within its deadline"):
        record().end(112.0, DeadlineExceeded("x"), gave_up=True)
