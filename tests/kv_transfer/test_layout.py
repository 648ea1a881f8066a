"""Offsets agree with numpy's idea of the same array, nonsense is refused, and incompatible peers are told apart by name."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from baton.errors import Incompatible
from kv_transfer.layout import AXES, KVLayout, check_compatible

Make = Callable[..., KVLayout]


@pytest.mark.parametrize("outer", list(permutations(AXES[:4])))
def test_offsets_are_those_of_a_dense_array(layout: Make, outer: tuple[str, ...]) -> None:
    kv = layout(axes=(*outer, "slot", "dim"), layers=range(1, 3), heads=range(2, 4), num_blocks=3)
    sizes = {"block": 3, "layer": 2, "part": 2, "head": 2, "slot": 2, "dim": 4}
    where = np.arange(kv.nbytes // 4).reshape([sizes[axis] for axis in kv.axes])
    for block, layer, part, head in np.ndindex(3, 2, 2, 2):
        index = {"block": block, "layer": layer, "part": part, "head": head, "slot": 0, "dim": 0}
        assert kv.offset(block, layer + 1, part, head + 2) == 4 * where[tuple(index[axis] for axis in kv.axes)]


@pytest.mark.parametrize("outer", list(permutations(AXES[:4])))
@pytest.mark.parametrize("part_dims", [(5,), (4, 1), (1, 2, 3)])
def test_parts_of_unequal_widths_lie_one_after_the_other_without_gaps(
    layout: Make, outer: tuple[str, ...], part_dims: tuple[int, ...]
) -> None:
    """Counted element by element, as the axes say: outermost first."""
    kv = layout(axes=(*outer, "slot", "dim"), layers=range(1, 3), heads=range(2, 4), num_blocks=3, part_dims=part_dims)
    sizes = {"block": 3, "layer": 2, "part": len(part_dims), "head": 2}
    at = 0
    for index in np.ndindex(*(sizes[axis] for axis in outer)):
        where = dict(zip(outer, index, strict=True))
        part = where["part"]
        assert kv.offset(where["block"], where["layer"] + 1, part, where["head"] + 2) == at
        assert kv.piece_bytes(part) == 2 * part_dims[part] * 4
        at += kv.piece_bytes(part)
    assert (at, at) == (kv.nbytes, 3 * kv.block_bytes)


def test_sizes(layout: Make) -> None:
    kv = layout(dtype="bfloat16")
    assert (kv.itemsize, kv.piece_bytes(1), kv.block_bytes, kv.nbytes) == (2, 16, 16 * 24, 16 * 24 * 8)


def test_strides_within_the_parts_depend_on_the_part_and_those_outside_do_not(layout: Make) -> None:
    kv = layout(part_dims=(6, 2), dtype="bfloat16", block_size=1)  # [block, layer, part, head, slot, dim]: 8 blocks, 3 layers, 4 heads
    assert [kv.stride(axis, 0) for axis in ("block", "layer", "head")] == [2 * 3 * 4 * 8, 2 * 4 * 8, 2 * 6]
    assert [kv.stride(axis, 1) for axis in ("block", "layer", "head")] == [2 * 3 * 4 * 8, 2 * 4 * 8, 2 * 2]
    kv = layout(axes=("part", "block", "layer", "head", "slot", "dim"), part_dims=(6, 2), dtype="bfloat16", block_size=1)
    assert [kv.stride("block", part) for part in range(2)] == [2 * 3 * 4 * 6, 2 * 3 * 4 * 2]
    assert kv.offset(0, 0, 1, 0) == 8 * kv.stride("block", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axes": ("block", "layer", "part", "slot", "head", "dim")}, "axes"),
        ({"axes": ("block",)}, "axes"),
        ({"dtype": "int3"}, "dtype"),
        ({"axes": AXES[:-2]}, "axes"),
        ({"axes": (*AXES[:3], "part", "slot", "dim")}, "axes"),
        ({"num_blocks": 0}, "size"),
        ({"block_size": 0}, "size"),
        ({"part_dims": ()}, "1 to 8 parts, this one 0"),
        ({"part_dims": (1,) * 1_000_000}, "1 to 8 parts, this one 1000000"),
        ({"axes": ("block",) * 1_000_000}, "axes or a dtype that nobody knows$"),
        ({"axes": ("b" * 1_000_000,)}, "axes or a dtype that nobody knows$"),
        ({"dtype": "f" * 1_000_000}, "axes or a dtype that nobody knows$"),
        ({"part_dims": (4, 0)}, "size"),
        ({"num_blocks": 2**32 - 1, "block_size": 2**32 - 1}, "bytes in one buffer"),
        ({"layers": range(2, 4)}, "layers"),
        ({"heads": range(4, 5)}, "heads"),
    ],
)
def test_what_cannot_exist_is_refused(layout: Make, change: dict[str, object], said: str) -> None:
    with pytest.raises(Incompatible, match=said):
        layout(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 4},
        {"dtype": "float16"},
        {"axes": ("layer", "block", "part", "head", "slot", "dim")},
        {"part_dims": (4, 8)},
        {"part_dims": (8,)},
        {"model_num_layers": 9},
        {"model_num_kv_heads": 9},
    ],
)
def test_incompatible_peers_are_both_described(layout: Make, change: dict[str, object]) -> None:
    source, target = layout(), replace(layout(), **change)  # type: ignore[arg-type]
    with pytest.raises(Incompatible) as caught:
        check_compatible([source], target)
    assert all(text in caught.value.message for text in (*change, source.describe(), target.describe()))
    assert source.describe() != target.describe(), "a description shows everything that peers must share"


@pytest.mark.parametrize("change", [{"layers": range(2)}, {"heads": range(1, 4)}])
def test_a_source_that_lacks_layers_or_heads_is_described_beside_the_target(layout: Make, change: dict[str, object]) -> None:
    source, target = layout(**change), layout()
    with pytest.raises(Incompatible) as caught:
        check_compatible([source], target)
    assert source.describe() in caught.value.message and target.describe() in caught.value.message


def test_a_latent_kept_as_one_part_does_not_fit_one_kept_as_two(layout: Make) -> None:
    one, two = layout(heads=range(1), part_dims=(576,), model=(3, 1)), layout(heads=range(1), part_dims=(512, 64), model=(3, 1))
    assert one.nbytes == two.nbytes
    with pytest.raises(Incompatible, match=r"part_dims.*parts 576.*parts 512\+64"):
        check_compatible([one], two)


def test_a_head_that_nobody_holds_is_missed(layout: Make) -> None:
    with pytest.raises(Incompatible, match=r"\(0, 2\)"):
        check_compatible([layout(heads=range(2))], layout())
    with pytest.raises(Incompatible, match="sources none"):
        check_compatible([], layout())
    check_compatible([layout(heads=range(2)), layout(heads=range(2, 4), num_blocks=99)], layout())
    with pytest.raises(Incompatible, match="1025 source ranks; 1024 are the most"):
        check_compatible([layout()] * 1025, layout())
