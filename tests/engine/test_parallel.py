"""Who holds what adds up; several ranks, over gloo, compute what one rank computes; a lost peer is an error in time."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.batch import Batch, Row
from baton.engine.parallel import Groups, Rendezvous
from baton.engine.placement import Placement
from baton.engine.rank import Rank
from baton.errors import ConfigError, NodeLost
from tests.engine.driving import TIMEOUT_S, Job, Tokens, asks, make_rank, run_in_processes, run_in_threads
from tests.engine.golden import assert_equal, expected

Tiny = Callable[[str], Path]
sizes = st.integers(1, 8)


def places(tp_size: int, dp_size: int, coupled: bool) -> list[Placement]:
    return [Placement.of(rank, tp_size, dp_size, coupled) for rank in range(tp_size * dp_size)]


@given(sizes, sizes, st.booleans())
def test_a_rank_knows_its_place(tp_size: int, dp_size: int, coupled: bool) -> None:
    ranks = places(tp_size, dp_size, coupled)
    assert [place.rank for place in ranks] == list(range(tp_size * dp_size))
    assert sum(place.leader for place in ranks) == dp_size
    domains = [ranks] if coupled else [ranks[start : start + tp_size] for start in range(0, len(ranks), tp_size)]
    for domain in domains:
        assert [place.domain_rank for place in domain] == list(range(domain[0].domain_size))


@given(sizes, sizes, st.integers(1, 6))
def test_every_head_expert_and_column_has_one_owner(tp_size: int, dp_size: int, each: int) -> None:
    group = places(tp_size, 1, False)
    for share in (Placement.heads, Placement.kv_heads, Placement.columns):
        assert [item for place in group for item in share(place, each * tp_size)] == list(range(each * tp_size))
    node = places(tp_size, dp_size, True)
    assert [item for place in node for item in place.experts(each * len(node))] == list(range(each * len(node)))
    assert all(place.expert_columns(each) == range(each) for place in group + node), "experts are whole"


@given(sizes, st.integers(1, 9), st.integers(1, 6))
def test_every_column_of_every_split_expert_has_one_owner(tp_size: int, num_experts: int, each: int) -> None:
    group = [Placement.of(rank, tp_size, split_experts=True) for rank in range(tp_size)]
    assert all(place.experts(num_experts) == range(num_experts) for place in group)
    assert [column for place in group for column in place.expert_columns(each * tp_size)] == list(range(each * tp_size))


@given(sizes, st.integers(1, 1000))
def test_every_vocabulary_row_has_one_owner(tp_size: int, vocab: int) -> None:
    rows = [place.vocab(vocab) for place in places(tp_size, 1, False)]
    assert [row for run in rows for row in run] == list(range(vocab))
    assert max(map(len, rows)) == len(rows[0]) == -(-vocab // tp_size)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_replicated_kv_heads_are_those_of_the_query_heads(kv_heads: int, replicas: int, each: int) -> None:
    heads = kv_heads * replicas * each
    for place in places(kv_heads * replicas, 1, False):
        held = place.kv_heads(kv_heads)
        assert len(held) == 1
        assert {head // (heads // kv_heads) for head in place.heads(heads)} == set(held)


@pytest.mark.parametrize(
    ("share", "total", "message"),
    [
        (Placement.heads, 32, "num_attention_heads=32 does not divide by 3 ranks"),
        (Placement.kv_heads, 8, "num_key_value_heads=8 does not divide by 3 ranks"),
        (Placement.kv_heads, 2, "num_key_value_heads=2 neither divides by tp=3 nor into it"),
        (Placement.columns, 100, "intermediate_size=100 does not divide by 3 ranks"),
        (Placement.experts, 64, "num_experts=64 does not divide by 3 ranks; choose a tp that divides it, or prefill.moe: tensor"),
    ],
)
def test_what_does_not_divide_is_refused_with_numbers(share: Callable[[Placement, int], range], total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share(Placement.of(0, 3), total)


def test_experts_that_do_not_divide_are_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"num_experts=64 does not divide by 6 ranks; dp \* tp must divide it"):
        Placement.of(0, 2, 3, coupled=True).experts(64)
    with pytest.raises(ConfigError, match=r"moe_intermediate_size=100 does not divide by 3 ranks; .*, or prefill\.moe: experts"):
        Placement.of(0, 3, split_experts=True).expert_columns(100)


def test_two_ranks_equal_transformers(tiny: Tiny) -> None:
    """Tensor-parallel groups; experts whole and split, and over two data-parallel ranks, one with nothing to do.

    One of every kind of layer; test_odd_models.py has every architecture in every layout.
    """
    many, few, none = tuple(asks(2, (1, 20), num_tokens=4)), tuple(asks(3, (5,), num_tokens=3)), ()
    jobs = [Job(tiny(arch), 2, 1, coupled=False, asks=(many,)) for arch in ("llama", "llama_tied", "qwen2", "qwen3_moe", "deepseek_v3")]
    jobs += [Job(tiny("qwen3_moe"), 1, 2, coupled=True, asks=groups) for groups in ((many, few), (none, many), (none, none))]
    jobs += [Job(tiny("deepseek_v3"), 1, 2, coupled=True, asks=(few, many))]
    jobs += [Job(tiny("qwen3_moe"), 2, 1, coupled=True, asks=(many,))]
    jobs += [Job(tiny("deepseek_v3"), 2, 1, coupled=False, asks=(many,), split_experts=True)]
    check(jobs, map(run_in_threads, jobs))


def test_four_ranks_equal_transformers(tiny: Tiny) -> None:
    """More tensor-parallel ranks than KV heads, experts split over them, and both kinds of parallelism at once."""
    many, few = tuple(asks(6, (1, 12), num_tokens=3)), tuple(asks(5, (5,), num_tokens=2))
    jobs = [Job(tiny("llama"), 4, 1, coupled=False, asks=(many,))]
    jobs += [Job(tiny("qwen3_moe"), 4, 1, coupled=False, asks=(many,), split_experts=True)]
    jobs += [Job(tiny("deepseek_v3"), 2, 2, coupled=True, asks=(many, few))]
    check(jobs, map(run_in_threads, jobs))


@pytest.mark.relay
def test_four_processes_equal_transformers(tiny: Tiny) -> None:
    """Every layout of four ranks."""
    many, few = tuple(asks(4, (1, 9, 30))), tuple(asks(5, (5,), num_tokens=3))
    jobs = [Job(tiny("qwen3_moe"), 2, 2, coupled=True, asks=groups) for groups in ((many, few), ((), many))]
    jobs += [Job(tiny("deepseek_v3"), 4, 1, coupled=False, asks=(many,), split_experts=split) for split in (False, True)]
    jobs += [Job(tiny("deepseek_v3"), 1, 4, coupled=True, asks=(few, (), many, ()))]
    jobs += [Job(tiny("llama"), 4, 1, coupled=False, asks=(many,)), Job(tiny("qwen2"), 2, 2, coupled=False, asks=(many, few))]
    check(jobs, run_in_processes(jobs))


def check(jobs: list[Job], results: Iterable[list[list[Tokens]]]) -> None:
    for job, groups in zip(jobs, results, strict=True):
        for wanted, got in zip(job.asks, groups, strict=True):
            assert_equal(got, expected(job.model_dir, wanted))


def test_alone_collectives_give_back_what_they_got() -> None:
    groups, x = Groups.alone(), torch.arange(6.0).view(3, 2)
    assert groups.all_reduce(x) is x
    assert groups.all_gather(x).tolist() == [x.tolist()]
    assert groups.exchange_sizes(7) == [7]
    assert groups.all_to_all(x, groups.exchange_counts([3]), [3]) is x


@pytest.fixture
def pair() -> Iterator[tuple[Groups, Groups, ThreadPoolExecutor]]:
    """The groups of two ranks, and two step threads; collectives give up after two seconds."""
    meeting = Rendezvous("127.0.0.1", 2.0)
    with ThreadPoolExecutor(2) as threads:
        joining = [threads.submit(Groups.connect, Placement.of(rank, 2), "127.0.0.1", meeting.port, 2.0) for rank in range(2)]
        first, second = (future.result(30.0) for future in joining)
        yield first, second, threads
    first.close()
    second.close()
    meeting.close()


Pair = tuple[Groups, Groups, ThreadPoolExecutor]


@pytest.mark.parametrize("length", [0, 1, 510, 511, 512, 5000])
def test_a_broadcast_of_any_length_arrives(length: int, pair: Pair) -> None:
    leader, follower, threads = pair
    heard = threads.submit(follower.broadcast, None)
    vector = np.arange(length)
    assert leader.broadcast(vector).tolist() == heard.result(30.0).tolist() == vector.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_collectives_take_any_dtype_and_uneven_splits(dtype: torch.dtype, pair: Pair) -> None:
    def exchange(groups: Groups, rank: int) -> tuple[list[float], list[list[float]], list[int]]:
        send = [[1, 2], [0, 3]][rank]
        receive = groups.exchange_counts(send)
        rows = torch.full((sum(send), 2), 10.0 * rank, dtype=dtype) + torch.arange(sum(send), dtype=dtype)[:, None]
        got = groups.all_to_all(rows, send, receive)[:, 0].tolist()
        assert got == groups.all_to_all(rows[:, :1], send, receive)[:, 0].tolist(), "a view that is not contiguous"
        gathered = groups.all_gather(groups.all_reduce(torch.full((3,), rank + 1.0, dtype=dtype)) * (rank + 1)).tolist()
        return got, gathered, groups.exchange_sizes(rank + 5)

    other = pair[2].submit(exchange, pair[1], 1)
    assert exchange(pair[0], 0) == ([0.0], [[3.0] * 3, [6.0] * 3], [5, 6])
    assert other.result(30.0) == ([1.0, 2.0, 10.0, 11.0, 12.0], [[3.0] * 3, [6.0] * 3], [5, 6])


def test_a_lost_peer_is_an_error(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(NodeLost, match="all-reduce of rank 0 failed"):
        pair[0].all_reduce(torch.ones(4))


@pytest.mark.relay
def test_groups_can_be_closed_while_a_step_waits_for_a_stopped_peer(pair: Pair) -> None:
    groups, _, threads = pair
    step = threads.submit(groups.all_reduce, torch.ones(4))
    while not step.running():
        time.sleep(0.01)
    time.sleep(0.5)
    groups.close()
    assert not step.done(), "close has waited for the collective"
    with pytest.raises(NodeLost):
        step.result(30.0)
    with pytest.raises(NodeLost, match="closed"):
        groups.exchange_sizes(1)


@pytest.mark.relay
def test_a_peer_that_never_comes_is_an_error() -> None:
    meeting = Rendezvous("127.0.0.1", 1.0)
    with pytest.raises(NodeLost, match="met not all of its 2 ranks"):
        Groups.connect(Placement.of(0, 2), "127.0.0.1", meeting.port, 1.0)
    meeting.close()


@pytest.mark.parametrize("arch", ["llama", "deepseek_v2", "qwen3_moe"])
def test_when_the_leaders_step_is_over_every_rank_has_written(arch: str, tiny: Tiny) -> None:
    """Also when nothing is sampled: decode reads blocks from all ranks as soon as the leader says that they are there."""
    meeting, ranks, both = Rendezvous("127.0.0.1", TIMEOUT_S), dict[int, Rank](), Barrier(2)

    def play(number: int) -> list[torch.Tensor]:
        placement = Placement.of(number, 2)
        groups = Groups.connect(placement, "127.0.0.1", meeting.port, TIMEOUT_S)
        ranks[number] = make_rank(tiny(arch), placement, groups, between_layers=lambda: time.sleep(0.1 * number))
        both.wait(TIMEOUT_S)
        ranks[number].forward(Batch.build([Row([5] * 20, 0, [0, 1, 2])]))
        seen = [part.clone() for part in ranks[1].kv.layers[-1].parts]
        both.wait(TIMEOUT_S)
        groups.close()
        return seen

    with ThreadPoolExecutor(2) as threads:
        by_leader, by_follower = threads.map(play, range(2), timeout=TIMEOUT_S)
    meeting.close()
    assert all(map(torch.equal, by_leader, by_follower))
