"""The part of the golden matrix that `make test` runs shows every pair that the whole matrix shows, and is as small as can be."""

from hypothesis import given
from hypothesis import strategies as st

from tests.relay.matrix import ARCHITECTURES, EXTRA, MAX_RANKS, MORE_EXTRA, PREFILL, WITH_EXPERTS, Cell, cells, covering

WHOLE = tuple(cells())


def shown(chosen):
    return set().union(*(cell.pairs for cell in chosen))


def test_the_matrix_is_the_one_of_the_issue():
    assert len(WHOLE) == len(set(WHOLE)) == 5 * 2 * 3 + 2 * 2
    assert {(cell.prefill, cell.decode) for cell in WHOLE if cell.arch == "llama"} == {
        (prefill, decode) for prefill in ("tp1", "tp2") for decode in ("dp1", "dp2", "tp2")
    }
    assert {cell.arch for cell in WHOLE if cell.decode == "dp2tp2"} == set(WITH_EXPERTS)
    assert all(cell.num_ranks <= MAX_RANKS for cell in (*WHOLE, *EXTRA, *MORE_EXTRA))
    assert Cell("qwen3_moe", "tp2", "dp2tp2").layout == {"prefill.tp": 2, "decode.dp": 2, "decode.tp": 2}


def test_every_pair_is_covered_by_as_few_cells_as_possible():
    chosen = covering(WHOLE)
    assert shown(chosen) == shown(WHOLE)
    # Each (architecture, decode shape) needs a cell of its own.
    assert len(chosen) == len({(cell.arch, cell.decode) for cell in WHOLE}) == 17
    assert not set(chosen) & {*EXTRA, *MORE_EXTRA}


@given(st.sets(st.builds(Cell, st.sampled_from(ARCHITECTURES), st.sampled_from(sorted(PREFILL)), st.sampled_from(["dp1", "dp2", "tp2"]))))
def test_any_set_of_cells_is_covered(some):
    chosen = covering(sorted(some, key=str))
    assert shown(chosen) == shown(some)
    assert len(chosen) == len(set(chosen))
