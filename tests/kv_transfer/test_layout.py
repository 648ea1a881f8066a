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


def test_sizes(layout: Make) -> None:
    kv = layout(dtype="bfloat16")
    assert (kv.itemsize, kv.piece_bytes, kv.block_bytes, kv.nbytes) == (2, 16, 16 * 24, 16 * 24 * 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axes": ("block", "layer", "part", "slot", "head", "dim")}, "axes"),
        ({"axes": ("block",)}, "axes"),
        ({"dtype": "int3"}, "dtype"),
        ({"num_blocks": 0}, "size"),
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
        {"head_dim": 8},
        {"dtype": "float16"},
        {"axes": ("layer", "block", "part", "head", "slot", "dim")},
        {"num_parts": 1},
        {"model_num_layers": 9},
        {"model_num_kv_heads": 9},
    ],
)
def test_incompatible_peers_are_both_described(layout: Make, change: dict[str, object]) -> None:
    source, target = layout(), replace(layout(), **change)
    with pytest.raises(Incompatible) as caught:
        check_compatible([source], target)
    assert all(text in caught.value.message for text in (*change, source.describe(), target.describe()))


def test_a_head_that_nobody_holds_is_missed(layout: Make) -> None:
    with pytest.raises(Incompatible, match=r"\(0, 2\)"):
        check_compatible([layout(heads=range(2))], layout())
    check_compatible([layout(heads=range(2)), layout(heads=range(2, 4), num_blocks=99)], layout())
