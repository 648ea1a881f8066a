"""How many blocks and how long a sequence a rank can hold. Pure."""

from __future__ import annotations

from baton.errors import ConfigError

MIN_BLOCKS = 2


def capacity(*, kv_memory: int, block_bytes: int, block_size: int, max_model_len: int, max_positions: int) -> tuple[int, int]:
    """(blocks, longest sequence in tokens). kv_memory and block_bytes in bytes; max_model_len 0: as long as model and memory allow.

    Raises ConfigError, with the numbers and what to change, if the memory cannot hold one longest sequence.
    """
    if max_model_len > max_positions:
        raise ConfigError(f"max_model_len {max_model_len} is beyond the model's {max_positions} positions; lower it")
    num_blocks = kv_memory // block_bytes
    needed = max(MIN_BLOCKS, -(-max_model_len // block_size))
    if num_blocks < needed:
        raise ConfigError(
            f"kv_memory of {kv_memory} bytes holds {num_blocks} blocks of {block_size} tokens ({block_bytes} bytes each), "
            f"at least {needed} are needed; set kv_memory to {needed * block_bytes} or more"
            + (", or lower max_model_len" * (max_model_len > 0))
        )
    return num_blocks, max_model_len or min(max_positions, num_blocks * block_size)
