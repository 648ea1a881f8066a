"""The simulated model draws from the whole context, and from nothing else."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from baton.request import FinishReason, Sampling
from simulator.model import EOS_ID, FIRST_ID, NUM_IDS, ROOT, answer, next_token, slot_after

prompts = st.lists(st.integers(0, 255), min_size=1, max_size=40)


@given(prompts, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_a_shorter_answer_is_the_start_of_a_longer_one(prompt, fewer, more, greedy):
    short, long = sorted((fewer, more))
    sampling = Sampling(max_tokens=long, temperature=0.0 if greedy else 1.0, seed=5)
    whole, part = answer(prompt, sampling), answer(prompt, replace(sampling, max_tokens=short))
    assert whole.token_ids[:short] == part.token_ids


@given(prompts, st.integers(1, 12))
def test_an_answer_goes_on_from_what_was_emitted(prompt, cut):
    sampling = Sampling(max_tokens=20, temperature=0.0)
    whole = answer(prompt, sampling)
    rest = answer([*prompt, *whole.token_ids[:cut]], replace(sampling, max_tokens=20 - cut))
    assert whole.token_ids[cut:] == rest.token_ids


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=30), st.data())
def test_every_slot_matters(slots, data):
    at = data.draw(st.integers(0, len(slots) - 1))
    drawn = set()
    for wrong in range(30):
        changed = [*slots]
        changed[at] = slots[at] ^ (wrong << 7)
        drawn.add(next_token(tuple(changed), greedy=True, seed=0, output_index=0))
    assert len(drawn) > 10


@given(prompts, st.integers(0, 2**63))
def test_tokens_are_printable_or_the_end(prompt, seed):
    made = answer(prompt, Sampling(max_tokens=30, temperature=1.0, seed=seed, stop_token_ids=(EOS_ID,)))
    *inner, last = made.token_ids
    assert all(FIRST_ID <= token_id < FIRST_ID + NUM_IDS for token_id in inner)
    assert (last == EOS_ID) == (made.finish_reason is FinishReason.STOP)


def test_slots_depend_on_all_before_them():
    assert slot_after(slot_after(ROOT, 1), 2) != slot_after(slot_after(ROOT, 3), 2)


def test_a_stop_string_ends_the_answer_before_it():
    whole = answer([1, 2, 3], Sampling(max_tokens=10, temperature=0.0))
    stop = whole.text[3:5]
    stopped = answer([1, 2, 3], Sampling(max_tokens=10, temperature=0.0), stop)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
