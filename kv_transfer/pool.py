"""The memory a node allocates for its KV cache and lends to its engine. Knows neither layouts nor who reads it.

One mapping:  [header | generations uint64 x num_blocks, page aligned | data, 2 MiB aligned in this process's memory]

Owner of every byte is the process that made the pool. Readers on the same host map the memfd read-only and trust what they copied only
if the nonce in the header and the generations of the blocks were right before and after. Nothing has a name that could outlive the owner:
a memfd goes with its last descriptor and mapping.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
from dataclasses import dataclass
from typing import Self

import numpy as np

from baton.errors import Incompatible
from kv_transfer.transport import NONCE_BYTES, UInt64

ALIGNMENT = 2 * 2**20  # what device registration and huge pages ask for
MAGIC = b"BatonKV1"
# magic, nonce, incarnation, num_blocks, block_bytes, generations offset, data offset
_HEADER = struct.Struct("<8s16s16sQQQQ")
_NONCE_AT = 8
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Header:
    """The first bytes of a pool."""

    nonce: bytes
    incarnation: bytes
    num_blocks: int
    block_bytes: int
    generations_offset: int
    data_offset: int

    @property
    def data_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    def pack(self) -> bytes:
        """As it lies in memory, little-endian."""
        return _HEADER.pack(
            MAGIC, self.nonce, self.incarnation, self.num_blocks, self.block_bytes, self.generations_offset, self.data_offset
        )

    @classmethod
    def unpack(cls, mapping: mmap.mmap) -> Self:
        """Read and check a header: everything it points to lies within the mapping. Raises Incompatible."""
        if len(mapping) < _HEADER.size:
            raise Incompatible("not a KV pool: too short", stage="pull", cause="kv_pool")
        magic, *fields = _HEADER.unpack_from(mapping)
        header = cls(*fields)
        end_of_generations = header.generations_offset + 8 * header.num_blocks
        if magic != MAGIC or end_of_generations > header.data_offset or header.data_offset + header.data_bytes > len(mapping):
            raise Incompatible("not a KV pool: its header makes no sense", stage="pull", cause="kv_pool")
        return header


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A pool as seen through one mapping: its owner's (writable) or a reader's (read-only). Valid as long as somebody holds it."""

    mapping: mmap.mmap
    header: Header
    data: memoryview  # uint8 [num_blocks * block_bytes]
    generations: UInt64  # [num_blocks]

    @classmethod
    def of(cls, mapping: mmap.mmap) -> Self:
        """The parts of a mapping whose header has been written. Raises Incompatible."""
        header = Header.unpack(mapping)
        data = memoryview(mapping)[header.data_offset : header.data_offset + header.data_bytes]
        generations = np.frombuffer(mapping, np.uint64, header.num_blocks, header.generations_offset)
        return cls(mapping, header, data, generations)

    def alive(self, nonce: bytes) -> bool:
        """Whether the mapping still is the pool that was exported with this nonce."""
        return not self.mapping.closed and bytes(self.mapping[_NONCE_AT : _NONCE_AT + NONCE_BYTES]) == nonce


class Pool:
    """`num_blocks` blocks of `block_bytes`; zeroed, so that generation 0 is no block's.

    shared: a memfd that readers on this host can map; else private memory. incarnation: 16 bytes of the owning group's life.
    data: writable memoryview of num_blocks * block_bytes bytes. generations: writable uint64 [num_blocks]; the engine stamps a block's
    before it writes new content. nonce: proves to a reader that it maps this very pool. Ended by its owner's `close` or death.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, incarnation: bytes = bytes(16), shared: bool = True) -> None:
        assert num_blocks > 0 and block_bytes > 0 and len(incarnation) == 16
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        generations_offset = mmap.PAGESIZE
        data_from = -(-(generations_offset + 8 * num_blocks) // mmap.PAGESIZE) * mmap.PAGESIZE
        # The address is known only once mapped: ask for one alignment more. Untouched pages cost nothing.
        size = data_from + ALIGNMENT + num_blocks * block_bytes
        self._fd = _sealed_memfd(size) if shared else None
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if self._fd is None else mmap.mmap(self._fd, size)
        if self._fd is None:
            mapping.madvise(mmap.MADV_HUGEPAGE)  # blocks lie scattered: fewer entries to translate their addresses, fewer faults
        data_offset = data_from + -(_address(mapping) + data_from) % ALIGNMENT
        mapping[: _HEADER.size] = Header(self.nonce, incarnation, num_blocks, block_bytes, generations_offset, data_offset).pack()
        self._view = View.of(mapping)

    @property
    def view(self) -> View:
        """The owner's own view: what loopback and tcp read from."""
        return self._view

    @property
    def data(self) -> memoryview:
        """Writable uint8 [num_blocks * block_bytes]."""
        return self._view.data

    @property
    def generations(self) -> UInt64:
        """Writable uint64 [num_blocks]."""
        return self._view.generations

    @property
    def shared(self) -> bool:
        """Whether other processes on this host can map it."""
        return self._fd is not None

    def readonly_fd(self) -> int:
        """A new descriptor that can be mapped for reading only; the caller closes it."""
        assert self._fd is not None, "private memory has no descriptor"
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Readers refuse the pool from now on. The memory itself goes when the last view of it (tensors, mappings of peers) is gone."""
        mapping = self._view.mapping
        if mapping.closed:
            return
        mapping[_NONCE_AT : _NONCE_AT + NONCE_BYTES] = bytes(NONCE_BYTES)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._view = View(mapping, self._view.header, memoryview(b""), np.zeros(0, np.uint64))
        with contextlib.suppress(BufferError):  # the engine's tensors still look into it: it is unmapped with the last of them
            mapping.close()


def map_readonly(fd: int) -> View:
    """Map a pool handed over by its owner; closes `fd`. Raises Incompatible if it is none, or could still be made shorter under us."""
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("it is not sealed against shrinking, which would kill its readers")
        mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise Incompatible(f"cannot map the KV pool: {error}", stage="pull", cause="kv_pool") from error
    finally:
        os.close(fd)
    return View.of(mapping)


def address_of(buffer: memoryview) -> int:
    """Where a buffer starts in this process's memory."""
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]) if len(buffer) else 0


def _address(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8, 1).__array_interface__["data"][0])


def _sealed_memfd(size: int) -> int:
    """Sealed against resizing, so that no reader can be hit by SIGBUS."""
    fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd
