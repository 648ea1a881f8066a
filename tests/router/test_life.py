"""A sequence's life under every order of events: each index delivered exactly once and in order, exactly one end, old attempts silent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.errors import InternalError
from baton.request import FinishReason, Sampling, SequenceRequest, TokenEvent, TokenLogprob
from router.life import Loss, Phase, SequenceLife, Signal

PROMPT = (5, 6, 7)


def token(index: int) -> int:
    return 100 + index


def life_of(max_tokens: int) -> SequenceLife:
    return SequenceLife("r-0", PROMPT, Sampling(max_tokens=max_tokens))


def event(request: SequenceRequest, first: int, count: int = 1, end: int | None = None) -> TokenEvent:
    """Tokens first … first+count-1 as a node says them; `end` is where an end-of-sequence token makes the sequence stop."""
    last = first + count
    reason = FinishReason.STOP if last == end else FinishReason.LENGTH if last == request.sampling.max_tokens else None
    ids = tuple(token(index) for index in range(first, last))
    return TokenEvent(request.request_id, request.attempt, first, ids, tuple(TokenLogprob(i, -1.0) for i in ids), reason)


def stream(request: SequenceRequest, stop: int, alone: bool) -> list[TokenEvent]:
    """What one stage says about one attempt: prefill its first token, decode everything from there."""
    first, end = len(request.emitted_ids), min(stop, request.sampling.max_tokens)
    return [event(request, index, end=stop) for index in range(first, first + 1 if alone else end)]


@given(
    max_tokens=st.integers(2, 12),
    stop=st.integers(2, 12),
    data=st.data(),
)
def test_doubled_and_interleaved_streams_deliver_each_index_once(max_tokens: int, stop: int, data: st.DataObject) -> None:
    life, end = life_of(max_tokens), min(max_tokens, stop)
    dispatch = life.dispatch()
    said = stream(dispatch.prefill, stop, alone=True) + stream(dispatch.decode, stop, alone=False)
    said = data.draw(st.permutations(said + data.draw(st.lists(st.sampled_from(said), max_size=8))))
    delivered = [delivery for item in said if (delivery := life.receive(item)) is not None]
    assert [i for delivery in delivered for i in delivery.token_ids] == [token(i) for i in range(end)]
    assert [p.token_id for delivery in delivered for p in delivery.logprobs] == [token(i) for i in range(end)]
    assert [delivery.output_index for delivery in delivered] == sorted({delivery.output_index for delivery in delivered})
    assert [delivery.finish_reason for delivery in delivered[:-1]] == [None] * (len(delivered) - 1)
    assert delivered[-1].finish_reason is (FinishReason.STOP if end == stop else FinishReason.LENGTH)
    assert life.phase is Phase.FINISHED


class LifeMachine(RuleBasedStateMachine):
    """Dispatches, failures and redirects at any time, while events of every attempt ever made arrive in any order."""

    @initialize(max_tokens=st.integers(1, 8), stop=st.integers(1, 12))
    def begin(self, max_tokens: int, stop: int) -> None:
        self.life, self.stop, self.end = life_of(max_tokens), stop, min(stop, max_tokens)
        self.said: list[TokenEvent] = []
        self.delivered: list[int] = []
        self.ends = 0
        self.cancelled = False

    def send(self, request: SequenceRequest, alone: bool) -> None:
        self.said += stream(request, self.stop, alone)

    @precondition(lambda self: self.life.phase is Phase.IDLE)
    @rule()
    def dispatch(self) -> None:
        dispatch = self.life.dispatch()
        assert dispatch.prefill.emitted_ids == self.life.emitted_ids
        self.send(dispatch.prefill, alone=True)
        if dispatch.decode is not None:
            assert dispatch.decode.attempt > dispatch.prefill.attempt
            self.send(dispatch.decode, alone=False)

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        if not self.said:
            return
        delivery = self.life.receive(data.draw(st.sampled_from(self.said)))
        if delivery is not None:
            assert not self.cancelled
            assert delivery.output_index == len(self.delivered)
            self.delivered += delivery.token_ids
            self.ends += delivery.finish_reason is not None

    @precondition(lambda self: self.life.attempt)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        loss = self.life.lost(data.draw(st.integers(1, self.life.attempt)))
        if loss is Loss.DECODE_ONLY and data.draw(st.booleans()):
            self.send(self.life.redirect(), alone=False)
        elif loss in (Loss.DECODE_ONLY, Loss.WHOLE):
            self.life.setback()

    @precondition(lambda self: not self.life.over)
    @rule(chance=st.integers(0, 9))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self.life.cancel()
            self.cancelled = True

    @invariant()
    def each_index_once_and_in_order(self) -> None:
        assert self.delivered == [token(index) for index in range(len(self.delivered))]
        assert self.life.emitted_ids == tuple(self.delivered)
        assert self.ends <= 1
        assert (self.life.phase is Phase.FINISHED) == (self.ends == 1)
        assert len(self.delivered) <= self.end

    def teardown(self) -> None:
        if self.life.over:
            return
        if self.life.phase is not Phase.IDLE:
            self.life.setback()
        self.said.clear()
        self.dispatch()
        while self.said and not self.life.over:
            delivery = self.life.receive(self.said.pop())
            self.delivered += delivery.token_ids if delivery else ()
        assert self.life.phase is Phase.FINISHED
        assert len(self.delivered) == self.end


TestLife = LifeMachine.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_one_token_needs_no_decode() -> None:
    life = life_of(2)
    first = life.dispatch()
    assert first.decode is not None
    assert life.receive(event(first.prefill, 0)).token_ids == (token(0),)
    life.setback()
    again = life.dispatch()
    assert again.decode is None
    assert again.prefill.emitted_ids == (token(0),)
    assert life.receive(event(again.prefill, 1)).finish_reason is FinishReason.LENGTH


def test_what_a_loss_means() -> None:
    life = life_of(8)
    assert life.lost(1) is Loss.STALE
    dispatch = life.dispatch()
    prefill, decode = dispatch.prefill, dispatch.decode
    assert life.lost(99) is Loss.STALE
    assert life.lost(prefill.attempt) is Loss.WHOLE
    life.receive(event(prefill, 0))
    assert life.lost(decode.attempt) is Loss.DECODE_ONLY
    assert life.awaits_decode(decode.attempt)
    other = life.redirect()
    assert life.lost(decode.attempt) is Loss.STALE
    assert other.emitted_ids == prefill.emitted_ids
    assert life.receive(event(other, 0)) is None
    assert not life.awaits_decode(other.attempt)
    assert life.lost(prefill.attempt) is Loss.HARMLESS
    assert life.lost(other.attempt) is Loss.WHOLE
    life.fail()
    assert life.lost(other.attempt) is Loss.STALE
    assert life.receive(event(other, 1)) is None


def test_cached_tokens_are_those_of_the_first_word() -> None:
    life = life_of(8)
    dispatch = life.dispatch()
    life.receive(replace(event(dispatch.prefill, 0), cached_tokens=32))
    life.setback()
    life.receive(replace(event(life.dispatch().prefill, 1), cached_tokens=48))
    assert life.cached_tokens == 32


def test_a_finish_may_come_after_its_token() -> None:
    life = life_of(8)
    dispatch = life.dispatch()
    life.receive(event(dispatch.prefill, 0))
    late = life.receive(event(dispatch.decode, 0, end=1))
    assert (late.token_ids, late.finish_reason) == ((), FinishReason.STOP)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda request: event(request, 7, count=2),
        lambda request: replace(event(request, 0), token_ids=(), logprobs=()),
        lambda request: replace(event(request, 0, count=2), logprobs=(TokenLogprob(1, 0.0),)),
    ],
)
def test_a_node_that_breaks_the_protocol_is_told_apart(wrong) -> None:
    life = life_of(8)
    request = life.dispatch().prefill
    with pytest.raises(InternalError, match="r-0"):
        life.receive(wrong(request))


def test_a_token_before_the_attempts_own_is_refused() -> None:
    life = life_of(8)
    life.receive(event(life.dispatch().prefill, 0))
    life.setback()
    with pytest.raises(InternalError, match=r"1\.\.8"):
        life.receive(event(life.dispatch().prefill, 0))


def test_an_illegal_change_is_a_bug() -> None:
    life = life_of(4)
    with pytest.raises(AssertionError, match="finish while idle"):
        life.step(Signal.FINISH)
    life.cancel()
    with pytest.raises(AssertionError, match="dispatch while cancelled"):
        life.dispatch()
