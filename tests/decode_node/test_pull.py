"""A pull's life: what is true is taken in whatever pieces it comes, what cannot be true is refused and changes nothing, and it ends."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Incompatible, InternalError
from baton.request import FinishReason, Sampling, SequenceRequest, TokenLogprob
from decode_node.pull import PULL_LIFE, PullEvent, PullLife, PullState, portions
from kv_transfer.lease import Announced, FinalToken

VOCAB = 100
NUM_BLOCKS = 6
MATCHED = 2
ASKED = Sampling(max_tokens=9, num_logprobs=2)
FINAL = FinalToken(3, 42, TokenLogprob(42, -0.5, ((42, -0.5), (7, -1.5))))


def pull(sampling=ASKED, state=PullState.LISTENING):
    """A pull of blocks 2..5 of a prompt, for output token 3."""
    life = PullLife(SequenceRequest("r", 1, (1, 2), sampling, (5, 6, 7)), MATCHED, NUM_BLOCKS, vocab_size=VOCAB, source="prefill:1")
    life.state = state
    return life


def announce(first, count, final=None):
    return Announced(first, tuple(range(10, 10 + count)), tuple(range(50, 50 + count)), final)


@given(st.lists(st.integers(1, NUM_BLOCKS), max_size=4), st.integers(1, 7))
def test_blocks_come_in_any_pieces_and_are_read_in_portions(cuts, most_blocks):
    life, read = pull(), []
    at, ends = MATCHED, [*sorted({cut for cut in cuts if MATCHED < cut < NUM_BLOCKS}), NUM_BLOCKS]
    for end in ends:
        announced = announce(at, end - at, FINAL if end == NUM_BLOCKS else None)
        life.announced(announced)
        assert life.state is PullState.READING
        pieces = list(portions(announced, most_blocks))
        assert all(0 < len(piece.block_ids) == len(piece.generations) <= most_blocks for piece in pieces)
        assert tuple(block for piece in pieces for block in piece.block_ids) == announced.block_ids
        assert tuple(generation for piece in pieces for generation in piece.generations) == announced.generations
        read += range(at, end)
        at = end
        life.on(PullEvent.COMPLETE if life.final else PullEvent.VERIFIED)
    assert (life.state, life.final, read) == (PullState.RELEASING, FINAL, list(range(MATCHED, NUM_BLOCKS)))


def test_a_final_announcement_may_come_without_blocks():
    life = pull()
    life.announced(announce(MATCHED, 4))
    life.on(PullEvent.VERIFIED)
    life.announced(announce(NUM_BLOCKS, 0, FINAL))
    assert life.final == FINAL and list(portions(announce(NUM_BLOCKS, 0), 4)) == []


LIES = {
    "blocks again": announce(1, 2),
    "blocks left out": announce(3, 2),
    "more blocks than the prompt has": announce(MATCHED, 5),
    "nothing": announce(MATCHED, 0),
    "all, and it is not all": announce(MATCHED, 3, FINAL),
    "a token before": announce(MATCHED, 4, replace(FINAL, output_index=2)),
    "a token after": announce(MATCHED, 4, replace(FINAL, output_index=4)),
    "a token of another vocabulary": announce(MATCHED, 4, replace(FINAL, token_id=VOCAB, logprob=TokenLogprob(VOCAB, -0.5))),
    "an end that is none": announce(MATCHED, 4, replace(FINAL, finish_reason=FinishReason.STOP)),
    "a log-probability of another token": announce(MATCHED, 4, replace(FINAL, logprob=TokenLogprob(41, -0.5))),
    "more log-probabilities": announce(MATCHED, 4, replace(FINAL, logprob=TokenLogprob(42, -0.5, ((1, -1.0),) * 3))),
    "log-probabilities of tokens that do not exist": announce(MATCHED, 4, replace(FINAL, logprob=TokenLogprob(42, -0.5, ((VOCAB, -1.0),)))),
    "no log-probability": announce(MATCHED, 4, replace(FINAL, logprob=None)),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_true_is_refused_and_changes_nothing(lie):
    life = pull()
    with pytest.raises(Incompatible, match="the source at prefill:1") as caught:
        life.announced(LIES[lie])
    assert (caught.value.retryable, caught.value.stage, caught.value.node) == (True, "pull", "prefill:1")
    assert (life.state, life.final) == (PullState.LISTENING, None)
    life.announced(announce(MATCHED, 4, FINAL))


def test_log_probabilities_that_nobody_asked_for_are_refused_and_none_are_taken():
    life = pull(Sampling(max_tokens=9))
    with pytest.raises(Incompatible):
        life.announced(announce(MATCHED, 4, FINAL))
    life.announced(announce(MATCHED, 4, replace(FINAL, logprob=None)))


def test_the_last_token_must_be_called_so():
    last = Sampling(max_tokens=4, num_logprobs=2)
    with pytest.raises(Incompatible, match="ends the request with None"):
        pull(last).announced(announce(MATCHED, 4, FINAL))
    pull(last).announced(announce(MATCHED, 4, replace(FINAL, finish_reason=FinishReason.LENGTH)))


@given(
    first=st.integers(0, 2**32 - 1) | st.integers(0, 8),
    blocks=st.lists(st.integers(0, 2**32 - 1), max_size=8),
    final=st.none()
    | st.builds(
        FinalToken,
        output_index=st.integers(0, 2**32 - 1) | st.just(3),
        token_id=st.integers(0, 2**32 - 1) | st.integers(0, 120),
        logprob=st.none()
        | st.builds(TokenLogprob, st.integers(0, 120), st.just(-1.0), st.tuples(st.tuples(st.integers(0, 120), st.just(-1.0)))),
        finish_reason=st.none() | st.sampled_from(FinishReason),
    ),
)
def test_any_announcement_is_taken_or_refused(first, blocks, final):
    life = pull()
    try:
        life.announced(Announced(first, tuple(blocks), tuple(blocks), final))
    except Incompatible:
        assert (life.state, life.final) == (PullState.LISTENING, None)
        return
    assert first == MATCHED and first + len(blocks) <= NUM_BLOCKS
    if final:
        assert len(blocks) == NUM_BLOCKS - MATCHED and final.output_index == 3 and final.token_id < VOCAB


@given(st.lists(st.sampled_from(PullEvent), max_size=30))
def test_whatever_happens_its_blocks_are_let_go_only_when_nothing_can_land(events):
    """A model of the reads beside it: bytes may land from ANNOUNCED on, until they were verified, have failed, or are QUIESCED."""
    life, landing = pull(state=PullState.REACHING), False
    for event in events:
        if not PULL_LIFE.allows(life.state, event):
            with pytest.raises(InternalError, match="impossible"):
                life.on(event)
            continue
        landing |= event is PullEvent.ANNOUNCED
        # What these report is that every rank has said so; see Intake.
        landing &= event not in (PullEvent.VERIFIED, PullEvent.COMPLETE, PullEvent.FAIL, PullEvent.QUIESCED)
        life.on(event)
        assert landing is (life.state in (PullState.READING, PullState.DRAINING, PullState.LOST))
        assert life.yields is (life.state.value in ("reaching", "opening", "listening", "reading", "draining"))


def test_a_state_that_does_not_end_by_itself_can_be_cancelled():
    for state in PullState:
        if not PULL_LIFE.ends(state) and state is not PullState.DRAINING:
            assert PULL_LIFE.allows(state, PullEvent.CANCEL), state


def test_nothing_announced_is_taken_but_while_listening():
    for state in set(PullState) - {PullState.LISTENING}:
        with pytest.raises(InternalError, match="impossible"):
            pull(state=state).announced(announce(MATCHED, 1))
