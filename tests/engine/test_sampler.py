"""The sampler against a slow reference in plain Python, against chance, and against the company a row is in."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.devices import open_device
from baton.engine.devices.cpu import CpuDevice
from baton.engine.sampler import Picks, sample, uniform

MASK = 2**64 - 1


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def how(seed=0, output_index=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **more):
    return SampleRow(seed, output_index, temperature, top_k, top_p, min_p, **more)


def batch_of(*rows):
    return Batch.build([Row([0], 0, [0], row) for row in rows])


def draw(logits, *rows):
    return sample(torch.as_tensor(logits, dtype=torch.float32), batch_of(*rows), picks_of(open_device("cpu")))


def picks_of(device):
    return Picks(device.argmax, device.draw)


def splitmix64(state):
    mixed = (state + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def slow_uniform(seed, output_index):
    return (splitmix64((splitmix64(seed) + output_index) & MASK) >> 40) / 2**24


def slow_weights(logits, row):
    """Masked probabilities of one row in fp64, and how near any cut was to falling elsewhere."""
    logits = [-math.inf if i in row.banned_ids else value for i, value in enumerate(logits)]
    most = max(logits)
    weights = [math.exp((value - most) / row.temperature) for value in logits]
    probs = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(probs)), key=lambda i: (-np.float32(probs[i]), i))
    order = order[: row.top_k] if row.top_k else order
    total, before, kept, margin = sum(probs[i] for i in order), 0.0, [], 1.0
    for i in order:
        margin = min(margin, abs(before - row.top_p * total)) if row.top_p < 1 and kept else margin
        if row.top_p < 1 and before >= row.top_p * total and kept:
            break
        kept.append(i)
        before += probs[i]
    margin = min([margin, *(abs(probs[i] - row.min_p * max(probs)) for i in kept if row.min_p)])
    kept = [i for i in kept if probs[i] >= row.min_p * max(probs)]
    return [probs[i] if i in kept else 0.0 for i in range(len(probs))], margin


def slow_draw(logits, row):
    """The token of one row, or None if rounding may decide it."""
    if row.temperature == 0:
        allowed = [i for i in range(len(logits)) if i not in row.banned_ids]
        return max(allowed, key=lambda i: (logits[i], -i))
    weights, margin = slow_weights(logits, row)
    target, reached = slow_uniform(row.seed, row.output_index) * sum(weights), 0.0
    for token_id, weight in enumerate(weights):
        margin = min(margin, abs(reached - target)) if reached else margin
        reached += weight
        if weight and reached > target:
            return token_id if margin > 1e-6 and reached - target > 1e-6 else None
    return None


ROWS = st.builds(
    how,
    seed=st.integers(0, MASK),
    output_index=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    banned_ids=st.lists(st.integers(0, 6), max_size=3, unique=True).map(tuple),
)
# Few values, so that there are ties at every cut.
LOGITS = st.lists(st.integers(-4, 4).map(lambda value: value / 2), min_size=12, max_size=12)


@given(st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=6), st.sampled_from([open_device("cpu"), CpuDevice()]))
@settings(max_examples=300)
def test_equals_the_slow_reference(cases, device):
    drawn = sample(torch.tensor([logits for logits, _ in cases]), batch_of(*(row for _, row in cases)), picks_of(device))
    for (logits, row), token_id in zip(cases, drawn.token_ids, strict=True):
        expected = slow_draw(logits, row)
        assert expected is None or token_id == expected


def test_most_cases_are_not_left_to_rounding():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 50, generator=generator)
    rows = [how(seed=i, temperature=0.7, top_k=10, top_p=0.8, min_p=0.02) for i in range(200)]
    expected = [slow_draw(values.tolist(), row) for values, row in zip(logits, rows, strict=True)]
    sure = [(i, token_id) for i, token_id in enumerate(expected) if token_id is not None]
    drawn = draw(logits, *rows).token_ids
    assert len(sure) > 190
    assert [int(drawn[i]) for i, _ in sure] == [token_id for _, token_id in sure]


@given(st.lists(st.tuples(st.integers(0, MASK), st.integers(0, 2**40)), min_size=1, max_size=20))
def test_uniform_is_the_stated_hash(pairs):
    seeds, indices = np.array([s for s, _ in pairs], np.uint64), np.array([i for _, i in pairs], np.int64)
    assert uniform(seeds, indices).tolist() == [slow_uniform(seed, index) for seed, index in pairs]


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.0625, 0.0625])
    count = 4096
    rows = [how(seed=11, output_index=i) for i in range(count)]
    drawn = np.bincount(draw(probs.log().expand(count, -1), *rows).token_ids, minlength=6)
    expected = probs.numpy() * count
    assert drawn[2] == 0
    positive = expected > 0
    chi_square = float((((drawn - expected) ** 2)[positive] / expected[positive]).sum())
    assert chi_square < 18.5, "4 degrees of freedom, p = 0.001"


def test_neighbouring_seeds_draw_independently():
    count = 4096
    tokens = [draw(torch.zeros(count, 4), *(how(seed=seed, output_index=i) for i in range(count))).token_ids for seed in (1, 2)]
    same = float((tokens[0] == tokens[1]).mean())
    assert abs(same - 0.25) < 0.03


@pytest.mark.parametrize("seed", [2**63, MASK])
def test_large_seeds(seed):
    assert slow_draw([0.0] * 9, how(seed=seed)) == draw([[0.0] * 9], how(seed=seed)).token_ids[0]


def companions():
    """Rows of every kind: each takes another path through the masks."""
    return [
        how(temperature=0.0),
        how(seed=1, temperature=0.8, top_p=0.9),
        how(seed=2, top_k=7),
        how(seed=3, top_k=1500, top_p=0.99, num_logprobs=3),
        how(seed=4, temperature=1.7),
        how(seed=5, min_p=0.1, num_logprobs=0),
        how(seed=6, temperature=5.0, top_p=0.999),
        how(seed=7, top_k=40, top_p=0.95, min_p=0.05, banned_ids=(0, 1)),
        how(seed=8, temperature=1e-6, top_p=0.5),
    ]


@pytest.mark.parametrize("vocab", [7, 513, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    rows = companions()
    logits = (3 * torch.randn(len(rows), vocab, generator=generator)).to(dtype).float()
    together = draw(logits, *rows)
    for order in ([*reversed(range(len(rows)))], [3, 1, 6], [6, 8, 1], *([i] for i in range(len(rows)))):
        subset = draw(logits[order], *(rows[i] for i in order))
        assert subset.token_ids.tolist() == together.token_ids[order].tolist()
        assert subset.logprobs.tolist() == together.logprobs[order].tolist()
        width = subset.top_logprobs.shape[1]
        assert subset.top_logprobs.tolist() == together.top_logprobs[order, :width].tolist()
        assert subset.top_ids.tolist() == together.top_ids[order, :width].tolist()


def test_probabilities_are_bit_identical_in_any_company():
    """Close calls show what equal tokens may hide: thousands of draws from a flat row, alone and in the middle of others."""
    vocab, count = 1031, 512
    flat = 0.01 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
    others = 5 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(1))
    for i in range(0, count, 64):
        rows = [how(seed=9, output_index=j, temperature=0.9, top_p=0.9) for j in range(i, i + 64)]
        alone = [int(draw(flat, row).token_ids[0]) for row in rows]
        mixed = draw(torch.cat([others, flat.expand(64, -1)]), how(top_k=3), how(), *rows)
        assert mixed.token_ids[2:].tolist() == alone


def test_top_p_reaches_behind_the_first_candidates():
    vocab = 5000
    allowed = set()
    for i in range(300):
        allowed.add(int(draw(torch.zeros(1, vocab), how(seed=i, top_p=0.5)).token_ids[0]))
    assert max(allowed) < vocab // 2, "ties at the cut go to the lower ids"
    assert max(allowed) > 2000


def test_ties_at_the_top_k_cut_go_to_the_lower_id():
    drawn = {int(draw([[1.0, 0.0, 1.0, 1.0, 0.0]], how(seed=i, top_k=2)).token_ids[0]) for i in range(50)}
    assert drawn == {0, 2}


def test_greedy_takes_the_lowest_of_equals_and_no_banned_id():
    drawn = draw([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0]], how(temperature=0.0), how(temperature=0.0, banned_ids=(1,)))
    assert drawn.token_ids.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [1.0, math.inf, 0.0], [-math.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_draw_is_named_and_disturbs_no_other(bad, temperature):
    row = how(temperature=temperature, top_k=2, top_p=0.9, num_logprobs=1)
    drawn, alone = draw([[3.0, 1.0, 2.0], bad, [0.0, 5.0, 1.0]], row, row, row), draw([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]], row, row)
    assert drawn.failed_rows == (1,)
    assert drawn.token_ids[[0, 2]].tolist() == alone.token_ids.tolist()
    assert 0 <= drawn.token_ids[1] < 3


def test_all_banned_is_no_draw_and_unknown_ids_are_banned_by_nature():
    drawn = draw([[0.0, 1.0], [0.0, 1.0]], how(banned_ids=(0, 1)), how(banned_ids=(1, 2, 900)))
    assert drawn.failed_rows == (0,)
    assert drawn.token_ids[1] == 0


def test_a_tiny_temperature_is_almost_greedy():
    assert draw([[90.0, 100.0, 99.0]], how(seed=3, temperature=1e-30)).token_ids[0] == 1


@pytest.mark.parametrize(("seed", "u", "token_id"), [(33_897_418, 0.0, 1), (14_790_804, 1 - 2**-24, 2)])
def test_the_smallest_and_the_largest_u_never_draw_what_has_probability_0(seed, u, token_id):
    assert uniform(np.array([seed], np.uint64), np.zeros(1, np.int64)) == u
    assert draw([[-200.0, 0.0, 0.0, -200.0]], how(seed=seed)).token_ids[0] == token_id


def test_logprobs_are_those_of_the_unmodified_distribution():
    logits = [[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 1.0, 1.0]]
    rows = [how(temperature=0.0, num_logprobs=3, banned_ids=(1,)), how(seed=1), how(seed=2, top_k=1, temperature=0.1, num_logprobs=0)]
    drawn = draw(logits, *rows)
    expected = torch.log_softmax(torch.tensor(logits), dim=-1)
    assert drawn.token_ids[0] == 3
    assert drawn.logprobs.tolist() == pytest.approx([float(expected[0, 3]), 0.0, float(expected[2, 0])])
    assert drawn.top_ids[0].tolist() == [1, 3, 2], "lower ids first among equals"
    assert drawn.top_logprobs[0].tolist() == pytest.approx(expected[0, [1, 3, 2]].tolist())
    assert drawn.top_ids.shape == (3, 3)
    assert not drawn.top_logprobs[1].any()


def test_top_logprobs_are_ordered_by_value_across_signs():
    drawn = draw([[-0.0, 0.0, -1e-3, 50.0, -70.0]], how(num_logprobs=5))
    assert drawn.top_ids[0].tolist() == [3, 0, 1, 2, 4]


def test_logits_are_left_as_they_are():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    draw(logits, how(top_k=2, banned_ids=(1,)), how(temperature=0.0))
    assert torch.equal(logits, before)


def test_nothing_to_sample():
    drawn = draw(torch.zeros(0, 5))
    assert drawn.token_ids.shape == drawn.logprobs.shape == (0,)
    assert drawn.top_ids.shape == drawn.top_logprobs.shape == (0, 0)


@given(st.integers(0, 2**32), st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=6))
def test_narrow_logits_are_drawn_from_as_if_they_were_wide(seed, kinds):
    """Only some rows are widened, and a device may have found the largest ones: neither shows."""
    logits = torch.randn(len(kinds), 50, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    rows = [
        how(seed=i, temperature=float(hot), banned_ids=(int(logits[i].argmax()), 99) if banned else (), num_logprobs=2 if asked else None)
        for i, (hot, banned, asked) in enumerate(kinds)
    ]
    narrow = sample(logits, batch_of(*rows), picks_of(open_device("cpu")))
    wide = draw(logits.float(), *rows)
    assert narrow.failed_rows == wide.failed_rows == ()
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        assert np.array_equal(vars_of(narrow)[name], vars_of(wide)[name]), name


def vars_of(sampled):
    return {field.name: getattr(sampled, field.name) for field in fields(sampled)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_fail_are_named_whatever_looked_for_the_largest(dtype):
    logits = torch.zeros(6, 40, dtype=dtype)
    logits[1, 3], logits[2, 39], logits[3], logits[4, 0] = torch.nan, torch.inf, -torch.inf, -torch.nan
    rows = [*[how(temperature=0.0)] * 5, how(temperature=0.0, banned_ids=tuple(range(40)))]
    found = [sample(logits, batch_of(*rows), picks_of(device)).failed_rows for device in (open_device("cpu"), CpuDevice())]
    assert found == [(1, 2, 3, 4, 5)] * 2
