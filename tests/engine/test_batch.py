"""A batch is laid out as its rows say and survives the broadcast between ranks bit for bit."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row, SampleRow

SAMPLES = st.builds(
    SampleRow,
    seed=st.integers(0, 2**64 - 1),
    output_index=st.integers(0, 2**40),
    temperature=st.floats(0, 4, width=32),
    top_k=st.integers(0, 100),
    top_p=st.floats(0, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    num_logprobs=st.none() | st.integers(0, 20),
    banned_ids=st.lists(st.integers(0, 1000), max_size=3).map(tuple),
)
ROWS = st.builds(
    Row,
    token_ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
    start=st.integers(0, 100),
    block_ids=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    sample=st.none() | SAMPLES,
)
NEW_BLOCKS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 2**64 - 1)), max_size=4)


@given(st.lists(ROWS, max_size=5), NEW_BLOCKS)
def test_pack_and_unpack_are_inverse(rows, new_blocks):
    batch = Batch.build(rows, new_blocks)
    packed = batch.pack()
    assert packed.dtype == np.int64
    assert packed.ndim == 1
    again = Batch.unpack(packed)
    for item in dataclasses.fields(Batch):
        before, after = getattr(batch, item.name), getattr(again, item.name)
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        assert np.array_equal(before, after)
        assert after.flags.writeable, "torch takes no others without a warning"


@given(st.lists(ROWS, max_size=5), NEW_BLOCKS)
def test_arrays_say_what_the_rows_say(rows, new_blocks):
    batch = Batch.build(rows, new_blocks)
    assert batch.num_sequences == len(rows)
    assert batch.num_tokens == sum(len(row.token_ids) for row in rows)
    for s, row in enumerate(rows):
        span = slice(batch.query_starts[s], batch.query_starts[s + 1])
        assert batch.token_ids[span].tolist() == row.token_ids
        assert batch.positions[span].tolist() == [row.start + i for i in range(len(row.token_ids))]
        assert batch.context_lens[s] == row.start + len(row.token_ids)
        assert batch.block_tables[s, : len(row.block_ids)].tolist() == row.block_ids
        assert not batch.block_tables[s, len(row.block_ids) :].any()
    assert list(zip(batch.new_blocks.tolist(), batch.new_generations.tolist(), strict=True)) == new_blocks


@given(st.lists(ROWS, max_size=5))
def test_sampled_rows_are_the_last_of_their_sequences(rows):
    batch = Batch.build(rows)
    ends = [int(batch.query_starts[s + 1]) - 1 for s, row in enumerate(rows) if row.sample]
    samples = [row.sample for row in rows if row.sample]
    assert batch.sample_rows.tolist() == ends
    assert batch.seeds.tolist() == [sample.seed for sample in samples]
    assert batch.output_indices.tolist() == [sample.output_index for sample in samples]
    assert batch.num_logprobs.tolist() == [-1 if sample.num_logprobs is None else sample.num_logprobs for sample in samples]
    for i, sample in enumerate(samples):
        assert tuple(batch.banned_ids[batch.banned_starts[i] : batch.banned_starts[i + 1]].tolist()) == sample.banned_ids
        assert np.float32(sample.temperature) == batch.temperatures[i]


def test_an_empty_batch():
    batch = Batch.build([])
    assert batch.num_tokens == batch.num_sequences == len(batch.sample_rows) == 0
    assert Batch.unpack(batch.pack()).block_tables.shape == (0, 0)


@given(st.lists(ROWS, max_size=4), st.lists(ROWS, max_size=4), NEW_BLOCKS, NEW_BLOCKS)
def test_a_batch_followed_by_another_is_the_batch_of_both(rows, others, new_blocks, other_blocks):
    whole = Batch.build([*rows, *others], [*new_blocks, *other_blocks])
    joined = Batch.build(rows, new_blocks).followed_by(Batch.build(others, other_blocks))
    for item in dataclasses.fields(Batch):
        expected, array = getattr(whole, item.name), getattr(joined, item.name)
        assert array.dtype == expected.dtype and array.shape == expected.shape
        assert np.array_equal(array, expected), item.name
