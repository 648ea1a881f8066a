"""What the kv_transfer tests share: small layouts, a transfer thread, pools whose bytes say where they belong, leaks made visible."""

import gc
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.thread import TransferThread

BLOCK_MAJOR = ("block", "layer", "part", "head", "slot", "dim")


@pytest.fixture
def layout() -> Callable[..., KVLayout]:
    def make(
        axes: tuple[str, ...] = BLOCK_MAJOR,
        num_blocks: int = 8,
        layers: range = range(3),
        heads: range = range(4),
        block_size: int = 2,
        part_dims: tuple[int, ...] = (4, 4),
        dtype: str = "float32",
        model: tuple[int, int] = (3, 4),
    ) -> KVLayout:
        sizes = (num_blocks, block_size, layers.start, len(layers), part_dims, heads.start, len(heads))
        return KVLayout(axes, *sizes, dtype, *model)

    return make


@pytest.fixture
def thread() -> Iterator[TransferThread]:
    transfer = TransferThread()
    yield transfer
    transfer.close()
    assert transfer.failure is None


@pytest.fixture
def pool() -> Iterator[Callable[..., Pool]]:
    """A pool of random bytes in which every block has a generation of its own."""
    pools: list[Pool] = []

    def make(num_blocks: int = 16, block_bytes: int = 4096, seed: int = 0, shared: bool = True) -> Pool:
        made = Pool(num_blocks, block_bytes, shared=shared)
        made.data[:] = np.random.default_rng(seed).bytes(len(made.data))
        made.generations[:] = np.arange(100, 100 + num_blocks)
        pools.append(made)
        return made

    yield make
    for made in pools:
        made.close()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Everything opened since is closed again, threads and descriptors both."""
    fds, threads = _open_fds(), threading.active_count()
    yield
    if _open_fds() > fds:
        gc.collect()  # a caught error and the frames of the test that caught it keep each other
    assert _open_fds() <= fds
    assert threading.active_count() <= threads


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
