"""A sequence's life under every order of events: each index delivered exactly once and in order, exactly one end, old attempts silent.

Whatever is lost, doubled or comes late is either not needed or found missing by asking, and then another dispatch finishes it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.errors import InternalError
from baton.request import FinishReason, Sampling, SequenceRequest, TokenEvent, TokenLogprob
from router.life import REQUEST_LIFE, Delivery, Dispatch, Loss, Phase, SequenceLife, Signal

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


def hear(life: SequenceLife, said: TokenEvent) -> Delivery | None:
    """As a router does: one token with nothing beside it is a row of what was drawn."""
    if len(said.token_ids) > 1 or said.logprobs or said.finish_reason:
        return life.receive(said)
    return life.draw(said.attempt, said.output_index, said.token_ids[0])


@given(
    max_tokens=st.integers(2, 12),
    stop=st.integers(2, 12),
    bare=st.booleans(),
    data=st.data(),
)
def test_doubled_and_interleaved_streams_deliver_each_index_once(max_tokens: int, stop: int, bare: bool, data: st.DataObject) -> None:
    life, end = life_of(max_tokens), min(max_tokens, stop)
    dispatch = life.dispatch()
    said = stream(dispatch.prefill, stop, alone=True) + stream(dispatch.decode, stop, alone=False)
    said = [replace(item, logprobs=()) for item in said] if bare else said
    said = data.draw(st.permutations(said + data.draw(st.lists(st.sampled_from(said), max_size=8))))
    delivered = [delivery for item in said if (delivery := hear(life, item)) is not None]
    assert [i for delivery in delivered for i in delivery.token_ids] == [token(i) for i in range(end)]
    assert [p.token_id for delivery in delivered for p in delivery.logprobs] == [token(i) for i in range(0 if bare else end)]
    assert [delivery.output_index for delivery in delivered] == sorted({delivery.output_index for delivery in delivered})
    assert [delivery.finish_reason for delivery in delivered[:-1]] == [None] * (len(delivered) - 1)
    assert delivered[-1].finish_reason is (FinishReason.STOP if end == stop else FinishReason.LENGTH)
    assert life.phase is Phase.FINISHED


class LifeMachine(RuleBasedStateMachine):
    """Dispatches, failures, redirects and questions at any time, while what every attempt ever said arrives in any order, twice or never.

    said: by every attempt so far, from its first token to its end. heard: output indices that have come from attempts that count.
    """

    @initialize(max_tokens=st.integers(1, 8), stop=st.integers(1, 12), bare=st.booleans())
    def begin(self, max_tokens: int, stop: int, bare: bool) -> None:
        self.bare = bare
        self.life, self.stop, self.end = life_of(max_tokens), stop, min(stop, max_tokens)
        self.said: list[TokenEvent] = []
        self.delivered: list[int] = []
        self.heard: set[int] = set()
        self.current: set[int] = set()
        self.ends = 0
        self.cancelled = False

    def send(self, request: SequenceRequest | None, one: bool) -> None:
        if request is not None:
            self.current.add(request.attempt)
            self.said += stream(request, self.stop, one)

    @precondition(lambda self: self.life.phase is Phase.IDLE)
    @rule(alone=st.booleans())
    def dispatch(self, alone: bool) -> None:
        before = self.life.attempt
        sent = self.life.dispatch(alone=alone)
        attempts = [request.attempt for request in (sent.prefill, sent.decode) if request is not None]
        assert attempts == list(range(before + 1, self.life.attempt + 1))
        assert (sent.prefill is None) == alone
        assert (sent.decode is None) == (not alone and self.life.num_emitted == self.life.sampling.max_tokens - 1)
        assert all(request.emitted_ids == self.life.emitted_ids for request in (sent.prefill, sent.decode) if request is not None)
        self.current, self.heard = set(), set()
        self.send(sent.prefill, one=True)
        self.send(sent.decode, one=False)

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        if self.said:
            self.take(data.draw(st.sampled_from(self.said)))

    def take(self, event: TokenEvent) -> None:
        counts = event.attempt in self.current and self.life.phase in (Phase.SENT, Phase.STREAMING)
        delivery = hear(self.life, replace(event, logprobs=()) if self.bare else event)
        if counts:
            self.heard.add(event.output_index)
        if delivery is not None:
            assert counts
            assert delivery.output_index == len(self.delivered)
            self.delivered += delivery.token_ids
            self.ends += delivery.finish_reason is not None

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        attempt = data.draw(st.integers(0, self.life.attempt + 1))
        next_index = data.draw(st.integers(0, self.end))
        counts = attempt in self.current and self.life.phase in (Phase.SENT, Phase.STREAMING)
        missing = set(range(len(self.delivered), next_index)) - self.heard
        assert self.life.lacks(attempt, next_index) == (counts and bool(missing))
        if self.life.lacks(attempt, next_index):
            self.life.setback()

    @precondition(lambda self: self.life.attempt)
    @rule(data=st.data(), forgotten=st.booleans())
    def lose(self, data: st.DataObject, forgotten: bool) -> None:
        attempt = data.draw(st.integers(1, self.life.attempt))
        loss = self.life.lost(attempt, forgotten=forgotten)
        assert (loss is Loss.STALE) == (attempt not in self.current or self.life.phase not in (Phase.SENT, Phase.STREAMING))
        if loss is Loss.DECODE_ONLY and data.draw(st.booleans()):
            self.current.discard(attempt)
            self.send(self.life.redirect(), one=False)
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
            assert self.cancelled or len(self.delivered) == self.end
            return
        if self.life.phase is not Phase.IDLE:
            self.life.setback()
        self.said.clear()
        self.dispatch(alone=False)
        while self.said and not self.life.over:
            self.take(self.said.pop())
        assert self.life.phase is Phase.FINISHED
        assert (len(self.delivered), self.ends) == (self.end, 1)


TestLife = LifeMachine.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


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


def both(dispatch: Dispatch) -> tuple[SequenceRequest, SequenceRequest]:
    assert dispatch.prefill is not None
    assert dispatch.decode is not None
    return dispatch.prefill, dispatch.decode


def test_what_a_loss_means() -> None:
    life = life_of(8)
    assert life.lost(1) is Loss.STALE
    prefill, decode = both(life.dispatch())
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


def test_prefill_may_forget_what_it_has_said_and_decode_has_to_pull() -> None:
    """The lease was released and decode's first word is on its way; if it was not, the pull fails, and decode says so."""
    life = life_of(8)
    prefill, _ = both(life.dispatch())
    assert life.lost(prefill.attempt, forgotten=True) is Loss.WHOLE
    life.receive(event(prefill, 0))
    assert life.lost(prefill.attempt) is Loss.WHOLE
    assert life.lost(prefill.attempt, forgotten=True) is Loss.HARMLESS
    life.setback()
    prefill, decode = both(life.dispatch())
    assert life.lost(prefill.attempt, forgotten=True) is Loss.WHOLE, "what an earlier dispatch has said does not count"
    assert life.lost(decode.attempt, forgotten=True) is Loss.DECODE_ONLY


def test_a_decode_group_alone_starts_from_the_prompt_and_is_lost_as_a_whole() -> None:
    life = life_of(2)
    sent = life.dispatch(alone=True)
    assert (sent.prefill, life.attempt) == (None, 1)
    assert sent.decode is not None
    assert life.awaits_decode(1)
    assert life.lost(1) is Loss.WHOLE
    assert life.receive(replace(event(sent.decode, 0), cached_tokens=3)).token_ids == (token(0),)
    assert life.cached_tokens == 3
    life.setback()
    again = life.dispatch(alone=True)
    assert again.decode is not None, "also for the last token"
    assert life.receive(event(again.decode, 1)).finish_reason is FinishReason.LENGTH


def test_what_was_lost_is_found_by_asking() -> None:
    life = life_of(8)
    prefill, decode = both(life.dispatch())
    assert not life.lacks(prefill.attempt, 0)
    assert life.lacks(prefill.attempt, 1)
    life.receive(event(prefill, 0))
    assert not life.lacks(decode.attempt, 1), "prefill's word is as good"
    life.receive(event(decode, 2))
    assert life.lacks(decode.attempt, 3)
    assert life.lacks(decode.attempt, 2**32 - 1), "at once, whatever a node claims"
    life.receive(event(decode, 1))
    assert not life.lacks(decode.attempt, 3)
    assert not life.lacks(99, 8)


def test_cached_tokens_are_those_of_the_first_word() -> None:
    life = SequenceLife("r-0", tuple(range(32)), Sampling(max_tokens=8))
    dispatch = life.dispatch()
    life.receive(replace(event(dispatch.prefill, 0), cached_tokens=32))
    life.setback()
    life.receive(replace(event(life.dispatch().prefill, 1), cached_tokens=48))
    assert life.cached_tokens == 32 == len(life.prompt_ids)


def test_emitted_tokens_that_are_found_again_are_no_part_of_the_prompt() -> None:
    life = life_of(8)
    life.receive(event(life.dispatch().prefill, 0))
    life.setback()
    life.receive(replace(event(life.dispatch().prefill, 1), cached_tokens=4))
    assert life.cached_tokens == len(PROMPT)


def test_a_finish_may_come_after_its_token() -> None:
    life = life_of(8)
    dispatch = life.dispatch()
    life.receive(event(dispatch.prefill, 0))
    late = life.receive(event(dispatch.decode, 0, end=1))
    assert (late.token_ids, late.finish_reason) == ((), FinishReason.STOP)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda request: event(request, 7, count=2), "7..9"),
        (lambda request: replace(event(request, 1), token_ids=(), logprobs=()), "1..1"),
        (lambda request: replace(event(request, 1, count=2), logprobs=(TokenLogprob(1, 0.0),)), "1 logprobs for 2 tokens"),
        (lambda request: replace(event(request, 1), token_ids=(7,)), "token 7 at output index 1, which is 101"),
        (lambda request: replace(event(request, 3), token_ids=(7,)), "token 7 at output index 3, which is 103"),
        (lambda request: event(request, 0, end=1), "an end after 1 tokens, where 2 have come"),
    ],
)
def test_a_node_that_breaks_the_protocol_is_told_apart(wrong, words: str) -> None:
    """Above all one that goes on from another token than the client has seen: say, a lease that was computed again, in bf16."""
    life = life_of(8)
    prefill, decode = both(life.dispatch())
    life.receive(event(prefill, 0))
    life.receive(event(decode, 1))
    life.receive(event(decode, 3))
    with pytest.raises(InternalError, match=words) as caught:
        life.receive(wrong(decode))
    assert "r-0" in caught.value.message
    assert life.emitted_ids == (token(0), token(1))


def test_prefill_says_one_token() -> None:
    life = life_of(8)
    with pytest.raises(InternalError, match=r"0\.\.2 .* 0\.\.1"):
        life.receive(event(life.dispatch().prefill, 0, count=2))


def test_nothing_comes_after_the_end() -> None:
    """A node that says more than its end cannot make the sequence miss it."""
    life = life_of(8)
    _, decode = both(life.dispatch())
    life.receive(event(decode, 3))
    life.receive(event(decode, 2, end=3))
    delivery = life.receive(event(decode, 0, count=2))
    assert delivery is not None
    assert delivery == delivery._replace(token_ids=(token(0), token(1), token(2)), finish_reason=FinishReason.STOP)


def test_a_token_before_the_attempts_own_is_refused() -> None:
    life = life_of(8)
    life.receive(event(life.dispatch().prefill, 0))
    life.setback()
    with pytest.raises(InternalError, match=r"0\.\.1 .* 1\.\.2"):
        life.receive(event(life.dispatch().prefill, 0))


def test_an_illegal_change_is_a_bug() -> None:
    life = life_of(4)
    with pytest.raises(InternalError, match="request: finish is impossible while idle"):
        life.step(Signal.FINISH)
    life.cancel()
    with pytest.raises(InternalError, match="dispatch is impossible while cancelled"):
        life.dispatch()


def test_over_is_where_the_table_ends() -> None:
    for phase in Phase:
        life = life_of(4)
        life.phase = phase
        assert life.over == REQUEST_LIFE.ends(phase)
