"""A step's bookkeeping: epochs, sleep, stamps, scattered writes; and that a cache is what the node's buffer holds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.config_json import load_spec
from baton.engine.devices import Matrix, open_device
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from baton.engine.rank import Rank
from baton.engine.runner import Runner
from baton.engine.spec import GateSpec

Tiny = Callable[[str], Path]
GREEDY = SampleRow(0, 0, 0.0, 0, 1.0, 0.0, 0)


def make(model_dir: Path, block_size: int = 4, num_blocks: int = 6) -> tuple[Runner, KVShape, bytearray, np.ndarray]:
    spec, place = load_spec(model_dir), Placement()
    shape = KVShape.of(spec, place, block_size)
    buffer, generations = bytearray(num_blocks * shape.block_bytes), np.zeros(num_blocks, np.uint64)
    rank = Rank(spec, place, Groups.alone(), model_dir, KVCache(shape, num_blocks, buffer, generations))
    rank.load()
    return Runner(rank, Groups.alone()), shape, buffer, generations


def test_steps_are_counted_and_nothing_to_do_means_sleep(tiny: Tiny) -> None:
    runner, *_ = make(tiny("qwen3"))
    runner.warm_up()
    first = runner.step(Batch.build([Row([5, 6], 0, [3], GREEDY), Row([7], 0, [1])]))
    assert (first.epoch, first.asleep, first.num_tokens, len(first.sampled.token_ids)) == (1, False, 3, 1)
    second = runner.step(Batch.build([]))
    assert (second.epoch, second.asleep, second.num_tokens, len(second.sampled.token_ids)) == (2, True, 0, 0)
    third = runner.step(Batch.build([Row([5, 6], 0, [3], GREEDY)]))
    assert third.epoch == runner.epoch == 3
    assert third.sampled.token_ids.tolist() == first.sampled.token_ids.tolist()


def test_a_forward_without_tokens_is_possible(tiny: Tiny) -> None:
    """A rank of a coupled domain takes part in steps in which only others have work."""
    model_dir = tiny("qwen3_moe")
    spec, place = load_spec(model_dir), Placement(coupled=True)
    shape = KVShape.of(spec, place, 4)
    rank = Rank(spec, place, Groups.alone(), model_dir, KVCache(shape, 2, bytearray(2 * shape.block_bytes), np.zeros(2, np.uint64)))
    rank.load()
    assert len(rank.forward(Batch.build([])).token_ids) == 0


def test_new_blocks_are_stamped_and_only_their_slots_written(tiny: Tiny) -> None:
    runner, shape, buffer, generations = make(tiny("qwen2"))
    runner.step(Batch.build([Row([5, 6, 7, 8, 9, 10], 0, [4, 2])], new_blocks=[(4, 11), (2, 12)]))
    assert generations.tolist() == [0, 0, 12, 0, 11, 0]
    view = np.frombuffer(buffer, np.float32).reshape(6, shape.num_layers, 2, shape.num_heads, shape.block_size, shape.part_dims[0])
    written = np.abs(view).sum(axis=(1, 2, 3, 5)) > 0
    assert written.tolist() == [[False] * 4, [False] * 4, [True, True, False, False], [False] * 4, [True] * 4, [False] * 4]


def test_blocks_copied_elsewhere_continue_a_sequence(tiny: Tiny) -> None:
    """What a pull does: the bytes of a block mean the same under any id in any cache of the same shape."""
    prompt = [9, 8, 7, 6, 5, 4]
    source, shape, from_buffer, _ = make(tiny("llama_tied"))
    target, _, to_buffer, _ = make(tiny("llama_tied"))
    first = source.step(Batch.build([Row(prompt, 0, [4, 2], GREEDY)])).sampled.token_ids.tolist()
    expected = source.step(Batch.build([Row(first, 6, [4, 2], GREEDY)])).sampled
    size = shape.block_bytes
    for here, there in ((4, 0), (2, 5)):
        to_buffer[there * size : (there + 1) * size] = from_buffer[here * size : (here + 1) * size]
    got = target.step(Batch.build([Row(first, 6, [0, 5], GREEDY)])).sampled
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    assert got.logprobs.tolist() == expected.logprobs.tolist()


@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "deepseek_v3"])
def test_rubbish_in_one_sequence_reaches_no_other(arch: str, rubbish: float, tiny: Tiny) -> None:
    """They share matrix products, gates, experts and scratch memory. The sequence itself fails, and only it."""
    runner, shape, buffer, _ = make(tiny(arch))
    prompts = Batch.build([Row([5] * 6, 0, [4, 2]), Row([7] * 7, 0, [1, 3])])
    batch = Batch.build([Row([6], 6, [4, 2], GREEDY), Row([8, 9], 7, [1, 3, 0], GREEDY)])
    runner.step(prompts)
    clean = runner.step(batch).sampled
    view = np.frombuffer(buffer, np.float32).reshape(6, -1)
    view[4] = rubbish
    assert view[4].nbytes == shape.block_bytes
    sampled = runner.step(batch).sampled
    assert (clean.failed_rows, sampled.failed_rows) == ((), (0,))
    assert (sampled.token_ids[1], sampled.logprobs[1]) == (clean.token_ids[1], clean.logprobs[1])


def test_warm_up_fits_into_any_cache(tiny: Tiny) -> None:
    for num_blocks in (1, 2, 6):
        make(tiny("llama"), num_blocks=num_blocks)[0].warm_up(max_tokens=1000)


def test_shape_of_a_rank_follows_its_heads(tiny: Tiny) -> None:
    spec = load_spec(tiny("llama"), "bfloat16")
    whole = KVShape.of(spec, Placement(), 16)
    halves = [KVShape.of(spec, Placement.of(rank, 2), 16) for rank in range(2)]
    assert [(half.head_start, half.num_heads) for half in halves] == [(0, 1), (1, 1)]
    assert sum(half.block_bytes for half in halves) == whole.block_bytes == 2 * 2 * 2 * 16 * 16 * 2
    assert [KVShape.of(spec, Placement.of(rank, 4), 16).head_start for rank in range(4)] == [0, 0, 1, 1]


@given(st.integers(1, 12), st.integers(1, 4), st.booleans(), st.integers(0, 1 << 16))
def test_experts_equal_a_loop_over_tokens(num_tokens: int, top_k: int, normalize: bool, seed: int) -> None:
    torch.manual_seed(seed)
    device, x = open_device("cpu"), torch.randn(num_tokens, 8)
    gate_up, down = torch.randn(5, 12, 8), torch.randn(5, 8, 6)
    weights, ids = device.route(torch.randn(num_tokens, 5), GateSpec(top_k, normalize=normalize))
    assert not normalize or torch.allclose(weights.sum(1), torch.ones(num_tokens))
    want = torch.zeros_like(x)
    for token, choice in np.ndindex(num_tokens, top_k):
        inner = device.silu_mul((gate_up[ids[token, choice]] @ x[token])[None])[0]
        want[token] += weights[token, choice] * (down[ids[token, choice]] @ inner)
    torch.testing.assert_close(device.experts(x, weights, ids, Matrix(gate_up), Matrix(down)), want, rtol=1e-4, atol=1e-4)
    halves = [
        device.experts(x, weights, ids - start, Matrix(gate_up[start:stop]), Matrix(down[start:stop])) for start, stop in ((0, 2), (2, 5))
    ]
    torch.testing.assert_close(halves[0] + halves[1], want, rtol=1e-4, atol=1e-4)
