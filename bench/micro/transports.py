"""What moving KV blocks costs beside one memcpy of as many bytes in the same run: by transport, and by length of the spans.

Blocks are read as in production (Reader: plan, checks before and after), from a process of its own unless the transport is loopback,
scattered on both sides so that no two of them merge. Pages have been touched before: see kv_transfer/resident.py for why that is fair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from baton.deadline import Deadline
from baton.engine.kv_shape import AXES
from bench.micro.limits import Limits, copy_some
from bench.micro.pool_process import served
from bench.micro.row import Row
from bench.timing import alternated
from kv_transfer.choose import Transport
from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.reader import Reader
from kv_transfer.resident import ahead
from kv_transfer.source import SourceRank
from kv_transfer.thread import TransferThread
from kv_transfer.transport import Export

TRANSPORTS: tuple[Transport, ...] = ("loopback", "shm", "tcp")
SPAN_BYTES = (4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 4 << 20)
POOL_BYTES = 256 << 20
PROMPT_LEN = 2000
READ_S = 20.0
_BEYOND_CACHES_BYTES = 1 << 27
_INCARNATION = bytes(16)


@dataclass(frozen=True, slots=True)
class Case:
    """One target rank that reads whole blocks of one source rank; num_blocks at once."""

    what: str
    source: KVLayout
    target: KVLayout
    num_blocks: int

    @property
    def read_bytes(self) -> int:
        """Of one read."""
        return self.num_blocks * self.target.block_bytes


def cases(pool_bytes: int = POOL_BYTES) -> Iterator[Case]:
    """Blocks that are one span each, of every length; then those of the bench model, whole and with its heads split."""
    for span in SPAN_BYTES:
        layout = _layout(pool_bytes // span, 16, 1, 1, span // 32)
        yield Case(f"spans of {span >> 10} KiB", layout, layout, max(1, min((24 << 20) // span, layout.num_blocks // 2)))
    for block_size in (16, 32, 64):
        whole = qwen3_60m(block_size, pool_bytes)
        yield Case(f"qwen3-60m, blocks of {block_size}", whole, whole, _prompt_blocks(whole))
        half = replace(whole, num_heads=2)
        yield Case(f"qwen3-60m, blocks of {block_size}, tp 1 to 2", whole, half, _prompt_blocks(half))
    short = qwen3_60m(16, pool_bytes)
    yield Case("qwen3-60m, a prompt of 50", short, short, 4)


def qwen3_60m(block_size: int, pool_bytes: int) -> KVLayout:
    """The bench model's cache on one rank: 12 layers, 4 KV heads of 64, key and value."""
    return _layout(pool_bytes // (12 * 4 * 2 * 64 * 2 * block_size), block_size, 12, 4, 64, 64)


def _layout(num_blocks: int, block_size: int, num_layers: int, num_heads: int, *part_dims: int) -> KVLayout:
    return KVLayout(AXES, num_blocks, block_size, 0, num_layers, part_dims, 0, num_heads, "bfloat16", num_layers, num_heads)


def _prompt_blocks(layout: KVLayout) -> int:
    return min(PROMPT_LEN // layout.block_size, layout.num_blocks // 2)


def rows(limits: Limits) -> Iterator[Row]:
    """Every case over every transport."""
    del limits  # memcpy is measured beside each case, in turns
    for case in cases():
        for transport in TRANSPORTS:
            yield measured(case, transport)


def measured(case: Case, transport: Transport) -> Row:
    """GB/s of one read after the other, beside memmoves of as many bytes, in turns."""
    size = max(_BEYOND_CACHES_BYTES, 2 * case.read_bytes)
    plain = np.ones(size, np.uint8), np.ones(size, np.uint8)
    with _reads(case, transport) as read:
        seconds, copied_s = alternated([read, partial(copy_some, *plain, case.read_bytes)])
    rate, limit = case.read_bytes / seconds / 1e9, case.read_bytes / copied_s / 1e9
    return Row(f"{transport}, {case.what}", rate, "GB/s", limit, "memcpy")


@contextmanager
def _reads(case: Case, transport: Transport) -> Iterator[Callable[[int], int]]:
    """A read of some blocks, others for every number."""
    with ExitStack() as stack:
        thread = TransferThread("bench-reader")
        stack.callback(thread.close)
        target = Pool(case.target.num_blocks, case.target.block_bytes, shared=False)
        stack.callback(target.close)
        export, pools = stack.enter_context(_source(case.source, transport))
        reader = Reader(thread, target.data, case.target, transport=transport, pools=pools)
        stack.callback(reader.close)
        reader.connect(_INCARNATION, [export], Deadline.after(READ_S))
        for _ in ahead(target.data, write=True):
            pass
        ways = list(orders(case))

        def read(number: int) -> int:
            source_blocks, target_blocks = ways[number % len(ways)]
            deadline = Deadline.after(READ_S)
            return reader.read(_INCARNATION, source_blocks, [1] * case.num_blocks, target_blocks, deadline).wait(deadline)

        for number in range(len(ways)):  # every page once
            read(number)
        yield read


@contextmanager
def _source(layout: KVLayout, transport: Transport) -> Iterator[tuple[Export, dict[bytes, Pool]]]:
    if transport != "loopback":
        with served(layout) as export:
            yield export, {}
        return
    with ExitStack() as stack:
        thread, pool = TransferThread("bench-source"), Pool(layout.num_blocks, layout.block_bytes)
        stack.callback(pool.close)
        stack.callback(thread.close)
        np.frombuffer(pool.data, np.uint8)[:] = 1
        pool.generations[:] = 1
        yield SourceRank(thread, pool, layout).export, {pool.nonce: pool}


def orders(case: Case) -> Iterator[tuple[list[int], list[int]]]:
    """Blocks to read from and to, all of both pools in turn, scattered."""
    source = np.random.default_rng(0).permutation(case.source.num_blocks)
    target = np.random.default_rng(1).permutation(case.target.num_blocks)
    for at in range(0, len(source) - case.num_blocks + 1, case.num_blocks):
        some = slice(at, at + case.num_blocks)
        yield source[some].tolist(), target[some].tolist()
