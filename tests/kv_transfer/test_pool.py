"""A pool is aligned, read-only to others, recognisable by its nonce, and gone for readers once its owner gives it up."""

import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Incompatible
from kv_transfer.pool import ALIGNMENT, Header, Pool, View, address_of, map_readonly

Make = Callable[..., Pool]


@pytest.mark.parametrize("shared", [True, False])
def test_data_is_zeroed_and_aligned(shared: bool, no_leaks: None) -> None:
    pool = Pool(3, 1000, shared=shared)
    assert address_of(pool.data) % ALIGNMENT == 0 and len(pool.data) == 3000 and pool.shared is shared
    assert not any(pool.data) and pool.generations.tolist() == [0, 0, 0]
    pool.close()
    pool.close()


def test_a_reader_sees_what_the_owner_writes_and_cannot_write(pool: Make) -> None:
    owner = pool()
    fd = owner.readonly_fd()
    with pytest.raises(OSError, match="denied"):
        mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    view = map_readonly(fd)
    assert view.alive(owner.nonce) and not view.alive(bytes(16))
    assert view.data == owner.data and view.data.readonly and not view.generations.flags.writeable
    owner.data[5], owner.generations[3] = 7, 9
    assert view.data[5] == 7 and view.generations[3] == 9


def test_a_closed_pool_is_refused_but_harmless(pool: Make) -> None:
    owner = pool()
    nonce, view, tensor = owner.nonce, map_readonly(owner.readonly_fd()), np.frombuffer(owner.data, np.uint8)
    before = view.data[0]
    owner.close()
    assert not view.alive(nonce) and not owner.view.alive(nonce)
    assert view.data[0] == before == tensor[0]


def test_the_size_is_sealed(pool: Make) -> None:
    fd = pool().readonly_fd()
    with pytest.raises(OSError):
        os.truncate(f"/proc/self/fd/{fd}", 10)
    os.close(fd)


def test_memory_that_its_owner_could_cut_short_is_not_mapped(pool: Make) -> None:
    """A reader of a page that is gone gets SIGBUS, which nothing catches."""
    owner = pool()
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(fd, owner.view.mapping[:])
    with pytest.raises(Incompatible, match="not sealed against shrinking"):
        map_readonly(fd)


@pytest.mark.parametrize("content", [b"", b"x", bytes(8192)])
def test_what_is_no_pool_is_refused(content: bytes, no_leaks: None) -> None:
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(Incompatible, match="KV pool"):
        map_readonly(fd)
    with pytest.raises(Incompatible, match="cannot map"):
        map_readonly(os.open("/dev/null", os.O_RDONLY))


@given(offsets=st.tuples(*[st.sampled_from([0, 8, 64, 4096, 8192, 2**63, 2**64 - 1])] * 4))
def test_a_header_of_any_numbers_is_refused_or_stays_within_the_mapping(offsets: tuple[int, int, int, int]) -> None:
    num_blocks, block_bytes, generations_offset, data_offset = offsets
    with mmap.mmap(-1, 8192) as mapping:
        header = Header(bytes(16), bytes(16), num_blocks, block_bytes, generations_offset, data_offset).pack()
        mapping[: len(header)] = header
        try:
            view = View.of(mapping)
        except Incompatible:
            return
        assert len(view.data) == num_blocks * block_bytes <= 8192 and len(view.generations) == num_blocks <= 1024
        del view


def test_a_header_that_points_outside_is_refused() -> None:
    with mmap.mmap(-1, 8192) as mapping:
        header = Header(bytes(16), bytes(16), 4, 4096, 4096, 4128).pack()
        mapping[: len(header)] = header
        with pytest.raises(Incompatible):
            View.of(mapping)
