"""Who holds what adds up; ranks in processes of their own, over gloo, compute what one rank computes; a lost peer is an error in time."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.parallel import Groups, Placement, Rendezvous
from baton.errors import ConfigError, NodeLost
from tests.engine.driving import Job, asks, assert_equal, expected, run_jobs
from tests.tiny_models import ARCHITECTURES

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
        (Placement.experts, 64, "num_experts=64 does not divide by 3 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_with_numbers(share: Callable[[Placement, int], range], total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share(Placement.of(0, 3), total)


def test_two_ranks_equal_transformers(tiny: Tiny) -> None:
    """Tensor-parallel groups of every architecture; experts over two data-parallel ranks, one of which has nothing to do."""
    many, few, none = tuple(asks(2, (1, 9, 30))), tuple(asks(3, (5,), num_tokens=3)), ()
    jobs = [Job(tiny(arch), 2, 1, coupled=False, asks=(many,)) for arch in ARCHITECTURES]
    jobs += [Job(tiny("qwen3_moe"), 1, 2, coupled=True, asks=groups) for groups in ((many, few), (none, many), (none, none))]
    jobs += [Job(tiny("qwen3_moe"), 2, 1, coupled=True, asks=(many,))]
    check(jobs)


@pytest.mark.relay
def test_four_ranks_equal_transformers(tiny: Tiny) -> None:
    """Both kinds of parallelism at once, and more tensor-parallel ranks than KV heads."""
    many, few = tuple(asks(4, (1, 9, 30))), tuple(asks(5, (5,), num_tokens=3))
    jobs = [Job(tiny("qwen3_moe"), 2, 2, coupled=True, asks=groups) for groups in ((many, few), ((), many))]
    check([*jobs, Job(tiny("llama"), 4, 1, coupled=False, asks=(many,)), Job(tiny("qwen2"), 2, 2, coupled=False, asks=(many, few))])


def check(jobs: list[Job]) -> None:
    for job, groups in zip(jobs, run_jobs(jobs), strict=True):
        for wanted, got in zip(job.asks, groups, strict=True):
            assert_equal(got, expected(job.model_dir, wanted))


def test_alone_collectives_give_back_what_they_got() -> None:
    groups, x = Groups.alone(), torch.arange(6.0).view(3, 2)
    assert groups.all_reduce(x) is x
    assert groups.all_gather(x).tolist() == [x.tolist()]
    assert groups.exchange_sizes(7) == [7]
    assert groups.all_to_all(x, groups.exchange_counts([3]), [3]) is x


def test_a_lost_peer_is_an_error_and_no_hang() -> None:
    meeting = Rendezvous("127.0.0.1", 30.0)
    peer = multiprocessing.get_context("spawn").Process(target=join_and_leave, args=(meeting.port,), daemon=True)
    peer.start()
    groups = Groups.connect(Placement.of(0, 2), "127.0.0.1", meeting.port, 30.0)
    long = torch.arange(2000).numpy()
    assert groups.broadcast(long) is not None
    peer.join(30.0)
    with pytest.raises(NodeLost, match="all-reduce of rank 0 failed"):
        groups.all_reduce(torch.ones(4))
    groups.close()
    meeting.close()


def join_and_leave(port: int) -> None:
    """The peer: gets a broadcast longer than one message, and is gone."""
    groups = Groups.connect(Placement.of(1, 2), "127.0.0.1", port, 30.0)
    assert groups.broadcast(None).tolist() == list(range(2000))


def test_a_peer_that_never_comes_is_an_error() -> None:
    meeting = Rendezvous("127.0.0.1", 1.0)
    with pytest.raises(NodeLost, match="met not all of its 2 ranks"):
        Groups.connect(Placement.of(0, 2), "127.0.0.1", meeting.port, 1.0)
    meeting.close()
