"""The plan as a proof by exhaustion: every byte of a target block comes exactly once, from a rank that owns exactly that piece."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.layout import KVLayout
from kv_transfer.reshard import Run, SourceReads, plan, spans

OUTER = ("block", "layer", "part", "head")


@st.composite
def shards(draw: st.DrawFn, num_layers: int, num_heads: int, axes: tuple[str, ...]) -> list[KVLayout]:
    """All ranks of one side: tp ranks that split or replicate the heads, times stages that split the layers."""
    tp = draw(st.sampled_from([tp for tp in (1, 2, 3, 4, 6, 8) if num_heads % tp == 0 or tp % num_heads == 0]))
    stages = draw(st.sampled_from([stages for stages in (1, 2, 3) if num_layers % stages == 0]))
    num_blocks = draw(st.integers(1, 5))
    heads, layers = max(1, num_heads // tp), num_layers // stages
    return [
        KVLayout(axes, num_blocks, 2, stage * layers, layers, 2, rank * num_heads // tp, heads, 3, "float16", num_layers, num_heads)
        for stage in range(stages)
        for rank in range(tp)
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[KVLayout], list[KVLayout]]:
    num_layers, num_heads = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4, 6]))
    axes = (*draw(st.permutations(OUTER)), "slot", "dim")
    return draw(shards(num_layers, num_heads, axes)), draw(shards(num_layers, num_heads, axes))


def pieces(layout: KVLayout, block: int) -> dict[int, tuple[int, int, int, int]]:
    """What every byte of one block is: offset -> (layer, part, head, byte within the piece)."""
    return {
        layout.offset(block, layer, part, head) + byte: (layer, part, head, byte)
        for layer in layout.layers
        for part in range(layout.num_parts)
        for head in layout.heads
        for byte in range(layout.piece_bytes)
    }


@given(pairs(), st.data())
def test_every_byte_comes_once_from_its_owner(both: tuple[list[KVLayout], list[KVLayout]], data: st.DataObject) -> None:
    sources, targets = both
    index = data.draw(st.integers(0, len(targets) - 1))
    target = targets[index]
    source_block = data.draw(st.integers(0, sources[0].num_blocks - 1))
    target_block = data.draw(st.integers(0, target.num_blocks - 1))
    wanted = pieces(target, target_block)
    owned = [pieces(source, source_block) for source in sources]
    written: Counter[int] = Counter()
    read: Counter[tuple[int, int]] = Counter()
    for reads in plan(sources, target, index, len(targets)):
        for run in reads.runs:
            source_at, target_at = run.source_base + source_block * run.source_stride, run.target_base + target_block * run.target_stride
            for byte in range(run.nbytes):
                assert owned[reads.source][source_at + byte] == wanted[target_at + byte]
                written[target_at + byte] += 1
                read[reads.source, source_at + byte] += 1
    assert written == dict.fromkeys(wanted, 1)
    assert set(read.values()) == {1}


@given(pairs(), st.data())
def test_spans_copy_the_same_bytes_as_block_after_block(both: tuple[list[KVLayout], list[KVLayout]], data: st.DataObject) -> None:
    sources, targets = both
    target = targets[0]
    target_blocks = data.draw(st.permutations(range(target.num_blocks)))[: sources[0].num_blocks]
    source_blocks = data.draw(st.permutations(range(sources[0].num_blocks)))[: len(target_blocks)]
    for reads in plan(sources, target):
        merged = spans(reads.runs, source_blocks, target_blocks)
        assert merged.total_bytes == reads.block_bytes * len(source_blocks)
        assert bytes_moved(merged) == bytes_moved(spans_one_by_one(reads, source_blocks, target_blocks))


def bytes_moved(moves) -> dict[int, int]:
    return {target + byte: source + byte for source, target, nbytes in moves for byte in range(nbytes)}


def spans_one_by_one(reads: SourceReads, source_blocks: list[int], target_blocks: list[int]) -> list[tuple[int, int, int]]:
    return [
        (run.source_base + source * run.source_stride, run.target_base + target * run.target_stride, run.nbytes)
        for source, target in zip(source_blocks, target_blocks, strict=True)
        for run in reads.runs
    ]


def whole(num_blocks: int, heads: range, layers: range = range(4)) -> KVLayout:
    axes = ("block", "layer", "part", "head", "slot", "dim")
    return KVLayout(axes, num_blocks, 2, layers.start, len(layers), 2, heads.start, len(heads), 3, "float16", 4, 4)


def test_equal_shards_are_one_run_and_neighbouring_blocks_one_span() -> None:
    (reads,) = plan([whole(8, range(4))], whole(6, range(4)))
    block = whole(1, range(4)).block_bytes
    assert reads.runs == (Run(0, block, 0, block, block),)
    assert list(spans(reads.runs, [1, 2, 3, 5], [0, 1, 2, 3])) == [(block, 0, 3 * block), (5 * block, 3 * block, block)]


def test_nothing_is_no_span() -> None:
    (reads,) = plan([whole(8, range(4))], whole(6, range(4)))
    assert len(spans(reads.runs, [], [])) == 0 and len(spans((), [1], [2])) == 0


def test_split_heads_merge_within_a_layer_and_part() -> None:
    reads = plan([whole(8, range(2)), whole(8, range(2, 4))], whole(8, range(4)))
    assert [part.source for part in reads] == [0, 1]
    assert [len(part.runs) for part in reads] == [8, 8]


def test_replicas_share_the_load_of_every_target_and_targets_start_at_different_ones() -> None:
    sources = [whole(8, range(4)) for _ in range(2)]
    first, second = (plan(sources, whole(8, range(4)), index, 2) for index in range(2))
    assert [part.block_bytes for part in (*first, *second)] == [whole(1, range(4)).block_bytes // 2] * 4
    assert first[0].runs != second[0].runs
