"""The plan as a proof by exhaustion: every byte of a target block comes exactly once, from a rank that owns exactly that piece, and
sources that hold the same serve the same."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Incompatible
from kv_transfer.layout import KVLayout
from kv_transfer.reshard import Run, SourceReads, plan, spans

OUTER = ("block", "layer", "part", "head")
BLOCK_MAJOR = (*OUTER, "slot", "dim")
Side = list[KVLayout]


def rank(
    num_layers: int,
    num_heads: int,
    layers: range,
    heads: range,
    part_dims: tuple[int, ...] = (3, 3),
    axes: tuple[str, ...] = BLOCK_MAJOR,
    num_blocks: int = 8,
) -> KVLayout:
    return KVLayout(axes, num_blocks, 2, layers.start, len(layers), part_dims, heads.start, len(heads), "float16", num_layers, num_heads)


def node(num_layers: int, num_heads: int, *, dp: int = 1, tp: int = 1, cuts: Sequence[int] = (), **rest: object) -> Side:
    """All ranks of a node by number: dp groups of tp ranks of pipeline stages. Fewer heads than ranks: neighbours hold the same one."""
    stages = [range(*ends) for ends in pairwise((0, *cuts, num_layers))]
    heads = [range(r * num_heads // tp, max((r + 1) * num_heads // tp, r * num_heads // tp + 1)) for r in range(tp)]
    return [rank(num_layers, num_heads, layers, mine, **rest) for _ in range(dp) for mine in heads for layers in stages]  # type: ignore[arg-type]


@st.composite
def nodes(draw: st.DrawFn, num_layers: int, num_heads: int, **rest: object) -> Side:
    """Any dp, any tp that divides the heads or is divided by them, layers cut anywhere; replicas come from dp and from tp > heads."""
    tp = draw(st.sampled_from([tp for tp in (1, 2, 3, 4, 6, 8) if num_heads % tp == 0 or tp % num_heads == 0]))
    cuts = sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=3))) if num_layers > 1 else []
    return node(num_layers, num_heads, dp=draw(st.integers(1, 3)), tp=tp, cuts=cuts, num_blocks=draw(st.integers(1, 4)), **rest)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Side, Side]:
    num_layers, num_heads = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 4, 6]))
    rest = {
        "axes": (*draw(st.permutations(OUTER)), "slot", "dim"),
        "part_dims": draw(st.sampled_from([(3, 3), (5,), (4, 1), (1, 2, 3)])),
    }
    return draw(nodes(num_layers, num_heads, **rest)), draw(nodes(num_layers, num_heads, **rest))


def pieces(layout: KVLayout, block: int) -> dict[int, tuple[int, int, int, int]]:
    """What every byte of one block is: offset -> (layer, part, head, byte within the piece)."""
    return {
        layout.offset(block, layer, part, head) + byte: (layer, part, head, byte)
        for layer in layout.layers
        for part in range(layout.num_parts)
        for head in layout.heads
        for byte in range(layout.piece_bytes(part))
    }


@given(pairs(), st.data())
def test_every_byte_comes_once_from_its_owner(both: tuple[Side, Side], data: st.DataObject) -> None:
    sources, targets = both
    index = data.draw(st.integers(0, len(targets) - 1))
    target = targets[index]
    source_block = data.draw(st.integers(0, sources[0].num_blocks - 1))
    target_block = data.draw(st.integers(0, target.num_blocks - 1))
    wanted = pieces(target, target_block)
    owned = [pieces(source, source_block) for source in sources]
    written: Counter[int] = Counter()
    read: Counter[tuple[int, int]] = Counter()
    for reads in plan(sources, target, targets[:index]):
        for run in reads.runs:
            source_at, target_at = run.source_base + source_block * run.source_stride, run.target_base + target_block * run.target_stride
            for byte in range(run.nbytes):
                assert owned[reads.source][source_at + byte] == wanted[target_at + byte]
                written[target_at + byte] += 1
                read[reads.source, source_at + byte] += 1
    assert written == dict.fromkeys(wanted, 1), "every slot exactly once"
    assert set(read.values()) == {1}, "no byte twice"


def served(sources: Side, targets: Side) -> list[int]:
    """Bytes per block that each source serves to all targets of a node."""
    total = [0] * len(sources)
    for index, target in enumerate(targets):
        for reads in plan(sources, target, targets[:index]):
            total[reads.source] += reads.block_bytes
    return total


def layer_bytes(layout: KVLayout) -> int:
    return layout.block_bytes // layout.num_layers


def replicas(sources: Side) -> Iterable[tuple[int, int]]:
    """Pairs of sources that hold the same."""
    return (
        (a, b)
        for a, b in combinations(range(len(sources)), 2)
        if (sources[a].layers, sources[a].heads) == (sources[b].layers, sources[b].heads)
    )


@given(pairs())
def test_replicas_serve_the_same_up_to_one_layer_of_one_target(both: tuple[Side, Side]) -> None:
    sources, targets = both
    total = served(sources, targets)
    assert sum(total) == sum(target.block_bytes for target in targets)
    most = max(layer_bytes(target) for target in targets)
    assert all(abs(total[a] - total[b]) <= most for a, b in replicas(sources))


@given(pairs())
def test_each_single_read_is_spread_over_replicas_too(both: tuple[Side, Side]) -> None:
    """Pulls run one by one: a lone sequence must not lean on one source either. Twice one layer: what others read is evened out as well."""
    sources, targets = both
    for index, target in enumerate(targets):
        mine = [0] * len(sources)
        for reads in plan(sources, target, targets[:index]):
            mine[reads.source] = reads.block_bytes
        assert all(abs(mine[a] - mine[b]) <= 2 * layer_bytes(target) for a, b in replicas(sources))


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "source", "target", "shares"),
    [
        (61, 1, {"tp": 4}, {"dp": 4}, [61, 61, 61, 61]),  # MLA: each source serves a quarter
        (61, 1, {"tp": 4}, {"dp": 2, "tp": 2}, [61, 61, 61, 61]),
        (1, 1, {"tp": 4}, {"dp": 4}, [1, 1, 1, 1]),  # one layer: target i reads from source i
        (1, 1, {"tp": 4}, {"dp": 2}, [1, 1, 0, 0]),
        (2, 1, {"tp": 4}, {"tp": 4}, [2, 2, 2, 2]),  # fewer layers than owners
        (3, 1, {"tp": 4}, {"dp": 2, "tp": 2}, [3, 3, 3, 3]),
        (3, 2, {"tp": 4}, {"dp": 1, "tp": 1}, [2, 1, 2, 1]),  # replicated heads
        (3, 2, {"tp": 4}, {"dp": 2, "tp": 1}, [3, 3, 3, 3]),
        (1, 2, {"tp": 4}, {"tp": 4}, [1, 1, 1, 1]),  # replicated on both sides
        (5, 4, {"tp": 2}, {"tp": 4}, [10, 10]),  # decode tp > prefill tp
        (4, 2, {"dp": 2, "tp": 1, "cuts": (2,)}, {"tp": 1}, [2, 2, 2, 2]),  # stages: each owner set is shared out by itself
    ],
)
def test_shares_in_layers_of_a_head(
    num_layers: int, num_heads: int, source: dict[str, int], target: dict[str, int], shares: list[int]
) -> None:
    sources, targets = node(num_layers, num_heads, **source), node(num_layers, num_heads, **target)
    one = sum(sources[0].piece_bytes(part) for part in range(2))
    assert served(sources, targets) == [share * one for share in shares]


@given(pairs(), st.data())
def test_spans_copy_the_same_bytes_as_block_after_block(both: tuple[Side, Side], data: st.DataObject) -> None:
    sources, targets = both
    target = targets[0]
    target_blocks = data.draw(st.permutations(range(target.num_blocks)))[: sources[0].num_blocks]
    source_blocks = data.draw(st.permutations(range(sources[0].num_blocks)))[: len(target_blocks)]
    for reads in plan(sources, target):
        merged = spans(reads.runs, source_blocks, target_blocks)
        assert merged.total_bytes == reads.block_bytes * len(source_blocks)
        assert bytes_moved(merged) == bytes_moved(spans_one_by_one(reads, source_blocks, target_blocks))


def bytes_moved(moves: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    return {target + byte: source + byte for source, target, nbytes in moves for byte in range(nbytes)}


def spans_one_by_one(reads: SourceReads, source_blocks: list[int], target_blocks: list[int]) -> list[tuple[int, int, int]]:
    return [
        (run.source_base + source * run.source_stride, run.target_base + target * run.target_stride, run.nbytes)
        for source, target in zip(source_blocks, target_blocks, strict=True)
        for run in reads.runs
    ]


def test_a_node_that_lacks_what_another_of_its_ranks_reads_is_no_reason_to_refuse_this_one() -> None:
    half, rest = node(2, 2, tp=2)
    (reads,) = plan([rest], rest, [half])
    assert reads.block_bytes == rest.block_bytes
    with pytest.raises(Incompatible, match="no source holds"):
        plan([rest], half, [rest])


def test_equal_shards_are_one_run_and_neighbouring_blocks_one_span() -> None:
    (source,), (target,) = node(4, 4), node(4, 4, num_blocks=6)
    (reads,) = plan([source], target)
    block = source.block_bytes
    assert reads.runs == (Run(0, block, 0, block, block),)
    assert list(spans(reads.runs, [1, 2, 3, 5], [0, 1, 2, 3])) == [(block, 0, 3 * block), (5 * block, 3 * block, block)]


def test_a_latent_of_equal_shards_is_one_run_whatever_the_axes_outside_of_it() -> None:
    (source,) = node(4, 1, part_dims=(5,))
    assert [len(reads.runs) for reads in plan([source], source)] == [1]
    (source,) = node(4, 1, part_dims=(4, 1), axes=("part", "block", "layer", "head", "slot", "dim"))
    (reads,) = plan([source], source)
    assert [run.nbytes for run in reads.runs] == [4 * 4 * 4, 4 * 4 * 1], "a block of part 0, then one of part 1, far away"


def test_nothing_is_no_span() -> None:
    (reads,) = plan(node(4, 4), node(4, 4)[0])
    assert len(spans(reads.runs, [], [])) == 0 and len(spans((), [1], [2])) == 0


def test_split_heads_merge_within_a_layer_and_part() -> None:
    reads = plan(node(4, 4, tp=2), node(4, 4)[0])
    assert [part.source for part in reads] == [0, 1]
    assert [len(part.runs) for part in reads] == [8, 8]


def test_replicas_serve_consecutive_layers_so_that_spans_stay_long() -> None:
    reads = plan(node(5, 4, dp=2), node(5, 4)[0])
    assert [(part.source, len(part.runs)) for part in reads] == [(0, 1), (1, 1)]
