"""Columns of running sequences: whatever joins, leaves and grows, a step's arrays are those that Python objects would give."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row
from baton.engine.sequence import Sequence
from baton.request import Sampling, SequenceRequest
from decode_node.rows import Rows

SIZE = 4
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 9),
    min_tokens=st.integers(0, 4),
    temperature=st.floats(0, 2, width=32),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=5).map(tuple),
    num_logprobs=st.none() | st.integers(0, 3),
)


@dataclasses.dataclass(eq=False)
class Entry:
    sequence: Sequence
    row: int | None = None


def entry(number, sampling, num_tokens=1, num_blocks=None):
    """A sequence with one token drawn; its blocks are its own by their numbers."""
    prompt = tuple((number + i) % 10 for i in range(num_tokens))
    sequence = Sequence.make(SequenceRequest(f"r{number}", number, prompt, sampling), SIZE)
    sequence.token_ids.append(number % 10)
    sequence.block_ids = [1000 * number + i for i in range(num_blocks or -(-len(sequence.token_ids) // SIZE))]
    return Entry(sequence)


def as_rows(entries):
    """The step as Python objects."""
    sequences = [one.sequence for one in entries]
    return Batch.build([Row([s.token_ids[-1]], len(s.token_ids) - 1, s.block_ids, s.sample_row()) for s in sequences], [(7, 8)])


def assert_equal(batch, expected):
    for item in dataclasses.fields(Batch):
        array, wanted = getattr(batch, item.name), getattr(expected, item.name)
        assert array.dtype == wanted.dtype and np.array_equal(array, wanted), item.name


def in_order(entries):
    return sorted(entries, key=lambda one: one.row)


@settings(deadline=None)
@given(st.data(), st.lists(SAMPLINGS, min_size=1, max_size=40))
def test_a_step_of_rows_is_a_step_of_objects(data, samplings):
    rows, here, number = Rows(SIZE), [], 0
    while samplings:
        for _ in range(data.draw(st.integers(1, 20))):
            if samplings:
                number += 1
                here.append(entry(number, samplings.pop(), data.draw(st.integers(1, 9))))
                rows.join(here[-1])
        for one in data.draw(st.lists(st.sampled_from(here), unique=True)) if here else ():
            here.remove(one)
            rows.leave(one)
            assert one.row is None
        rows.settle()
        assert sorted(one.row for one in here) == list(range(len(here))), "rows are dense"
        assert rows.num_wanted == len(here)
        for one in sorted(rows.without_slot(), key=lambda one: one.row):
            assert len(one.sequence.token_ids) > SIZE * len(one.sequence.block_ids)
            one.sequence.block_ids.append(1000 * one.sequence.request.attempt + len(one.sequence.block_ids))
            rows.extend(one)
        assert not rows.without_slot()
        left_out = data.draw(st.lists(st.sampled_from(here), unique=True, max_size=3)) if here else []
        picked = rows.pick(left_out)
        taking_part = in_order([one for one in here if one not in left_out])
        assert rows.items(picked) == taking_part and picked.count == len(taking_part)
        assert all(picked.holds(one.row) is (one in taking_part) for one in here)
        batch = rows.batch(picked, [(7, 8)])
        expected = as_rows(taking_part)
        assert_equal(batch, expected)
        here = step(data, rows, picked, taking_part, here)
        assert_equal(batch, expected)


def step(data, rows, picked, taking_part, here):
    """Every row draws a token; those that end leave."""
    token_ids = np.array([data.draw(st.integers(0, 9)) for _ in taking_part], np.int64)
    failed = data.draw(st.sets(st.integers(0, max(0, len(taking_part) - 1)), max_size=2)) if taking_part else set()
    unwanted = data.draw(st.lists(st.sampled_from(taking_part), unique=True, max_size=2)) if taking_part else []
    for one in unwanted:
        rows.unwanted(one)
    moved = rows.move(picked, token_ids, failed)
    drawn = list(rows.drawn(picked, moved, token_ids).rows())
    expected = []
    for place, (one, token_id) in enumerate(zip(taking_part, token_ids.tolist(), strict=True)):
        sequence, sampling = one.sequence, one.sequence.request.sampling
        index = len(sequence.token_ids) - len(sequence.request.prompt_ids)
        over = place in failed or one in unwanted or sampling.finish(index + 1, token_id) is not None
        plain = not over and sampling.num_logprobs is None
        assert bool(moved.plain[place]) is plain and moved.output_indices[place] == index
        assert (place in moved.filled) is (place not in failed and len(sequence.token_ids) % SIZE == 0)
        expected += [(*sequence.request.key, index, token_id)] if plain else []
        sequence.token_ids.append(token_id)
        if over:
            rows.leave(one)
    assert drawn == expected
    return [one for one in here if one.row is not None]


def test_long_tables_and_many_rows_are_made_room_for():
    rows = Rows(SIZE)
    entries = [entry(number, Sampling(max_tokens=500), num_blocks=number) for number in range(1, 60)]
    for one in entries:
        rows.join(one)
    assert_equal(rows.batch(rows.pick([]), [(7, 8)]), as_rows(entries))
    for one in entries[:50]:
        rows.leave(one)
    rows.settle()
    batch = rows.batch(rows.pick([]), [(7, 8)])
    assert_equal(batch, as_rows(in_order(entries[50:])))
    for one in entries[50:]:
        rows.leave(one)
    rows.settle()
    late = entry(99, Sampling(max_tokens=500), num_blocks=1)
    rows.join(late)
    assert rows.batch(rows.pick([]), []).block_tables.tolist() == [[99_000]]
