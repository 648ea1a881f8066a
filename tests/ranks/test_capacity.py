"""What a rank can hold, and what it says when that is too little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from ranks.capacity import MIN_BLOCKS, capacity

sizes = st.integers(1, 10_000)


@given(
    kv_memory=sizes,
    block_bytes=st.integers(1, 100),
    block_size=st.integers(1, 64),
    wanted=st.integers(0, 500),
    positions=st.integers(1, 500),
)
def test_the_longest_sequence_fits_or_is_refused(kv_memory: int, block_bytes: int, block_size: int, wanted: int, positions: int) -> None:
    try:
        num_blocks, longest = capacity(
            kv_memory=kv_memory, block_bytes=block_bytes, block_size=block_size, max_model_len=wanted, max_positions=positions
        )
    except ConfigError:
        assert wanted > positions or kv_memory // block_bytes < max(MIN_BLOCKS, wanted / block_size)
        return
    assert num_blocks * block_bytes <= kv_memory
    assert longest == wanted or wanted == 0
    assert 0 < longest <= min(positions, num_blocks * block_size)


def test_a_refusal_has_the_numbers_and_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"holds 3 blocks of 16 tokens .* at least 7 are needed; set kv_memory to 70 or more, or lower"):
        capacity(kv_memory=30, block_bytes=10, block_size=16, max_model_len=100, max_positions=1000)
    with pytest.raises(ConfigError, match="beyond the model's 64 positions"):
        capacity(kv_memory=1000, block_bytes=10, block_size=16, max_model_len=100, max_positions=64)
