"""Who owns each KV block, and which blocks hold a prefix worth keeping. Pure: knows block numbers and hashes, no memory.

Region map: every block is in exactly one state, so free + cached + held + quarantined = total.

    FREE ──take──▶ HELD ──release, in the tree──▶ CACHED ──match──▶ HELD
      ▲             │ └──release, not in the tree──▶ FREE
      │             └──quarantine──▶ QUARANTINED ──unquarantine──▶ FREE
      └──evicted by take, drop_cache── CACHED

A *reservation* is a promise by count: `reserved` of the free and cached blocks will be taken later and cannot be given
to anybody else. The prefix tree is keyed by chained content hashes, so a hash names a block's tokens and all before them.
"""

from __future__ import annotations

import enum
import hashlib
import heapq
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.errors import ResourceExhausted
from baton.request import BlockCounts

HASH_BYTES = 16
RETRY_AFTER_S = 1.0


def root_hash(salt: bytes = b"") -> bytes:
    """The parent of a sequence's first block; `salt` keeps the trees of tenants apart."""
    return hashlib.blake2b(b"baton.block." + salt, digest_size=HASH_BYTES).digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block: blake2b-128 over its parent's hash and its token ids as little-endian u32."""
    return _hash_of(parent, _as_bytes(token_ids))


def _as_bytes(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _hash_of(parent: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(parent + content, digest_size=HASH_BYTES).digest()


def chain_hashes(token_ids: Sequence[int], block_size: int, salt: bytes = b"", num_blocks: int | None = None) -> tuple[bytes, ...]:
    """One 16-byte hash per full block of `token_ids` (of the first `num_blocks` of them): the same on every node."""
    full = len(token_ids) // block_size
    count = full if num_blocks is None else min(full, num_blocks)
    hashes, parent = [], root_hash(salt)
    content, width = _as_bytes(token_ids[: count * block_size]), 4 * block_size
    for start in range(0, count * width, width):
        parent = _hash_of(parent, content[start : start + width])
        hashes.append(parent)
    return tuple(hashes)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockState(enum.Enum):
    """Where a block is; see the region map above."""

    FREE = "free"
    CACHED = "cached"
    HELD = "held"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class _Place:
    """A block's place in the prefix tree: made by insert, gone when the block or one of its ancestors is evicted."""

    content_hash: bytes
    parent: int | None
    children: set[int] = field(default_factory=set)


class BlockPool:
    """All KV blocks of one group. State owner: the leader's loop; nothing here waits or locks.

    Cached blocks are evicted least recently used first, children before parents. Every operation costs O(1) or
    O(log num_blocks) per block it touches.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._states = [BlockState.FREE] * num_blocks
        self._generations = [0] * num_blocks
        # A heap: the lowest numbers first, so that neighbours are handed out together and their spans merge when pulled.
        self._free = list(range(num_blocks))
        # Least recently used first. A cached child is always before its cached parent.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs: dict[int, int] = {}
        self._quarantined: set[int] = set()
        self._reserved = 0
        self._places: dict[int, _Place] = {}
        self._by_hash: dict[bytes, int] = {}

    def counts(self) -> BlockCounts:
        """Where the blocks are."""
        return BlockCounts(self.num_blocks, len(self._free), len(self._cached), len(self._refs), len(self._quarantined))

    def available(self) -> int:
        """Blocks nobody holds and nobody was promised."""
        return len(self._free) + len(self._cached) - self._reserved

    def state(self, block: int) -> BlockState:
        """Where one block is."""
        return self._states[block]

    def generation(self, block: int) -> int:
        """How often the block was taken so far: a reader compares it before and after."""
        return self._generations[block]

    def reserve(self, count: int) -> bool:
        """Promise `count` blocks to the caller, who must take or unreserve them. False, and nothing promised, if they do not fit."""
        assert count >= 0
        if count > self.available():
            return False
        self._reserved += count
        return True

    def unreserve(self, count: int) -> None:
        """Give back a promise that was not spent."""
        assert 0 <= count <= self._reserved
        self._reserved -= count

    def peek(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks `match` would find; holds nothing."""
        for i, content_hash in enumerate(hashes):
            if content_hash not in self._by_hash:
                return i
        return len(hashes)

    def fits(self, hashes: Sequence[bytes], count: int) -> bool:
        """Whether a sequence of `count` blocks, whose leading ones may match `hashes`, can hold or reserve all of them now."""
        lacking = count - self.available()
        if not 0 < lacking <= len(hashes):
            return lacking <= 0  # however many of them match
        for content_hash in hashes:
            block = self._by_hash.get(content_hash)
            if block is None:
                break
            lacking -= self._states[block] is BlockState.HELD
        return lacking <= 0

    def match(self, hashes: Sequence[bytes], limit: int | None = None) -> tuple[int, ...]:
        """The longest cached prefix, at most `limit` blocks; each is held once more, by the caller.

        Stops before a cached block whose loss would break an earlier reservation.
        """
        found: list[int] = []
        for content_hash in hashes[:limit]:
            block = self._by_hash.get(content_hash)
            if block is None or (block in self._cached and self.available() == 0):
                break
            self._hold(block)
            found.append(block)
        return tuple(found)

    def take(self, count: int, *, reserved: bool) -> tuple[tuple[int, int], ...]:
        """(block, new generation) of `count` blocks for new content, held once by the caller.

        reserved: spend the caller's reservation, which always fits. Otherwise raises ResourceExhausted if it does not fit.
        Evicts cached blocks when no free ones are left.
        """
        assert count >= 0
        if reserved:
            self.unreserve(count)
        elif count > self.available():
            raise ResourceExhausted(
                f"{count} KV blocks wanted, {self.available()} of {self.num_blocks} available",
                cause="blocks",
                retry_after_s=RETRY_AFTER_S,
            )
        return tuple(self._take() for _ in range(count))

    def insert(self, block: int, content_hash: bytes, parent: bytes | None) -> bool:
        """Enter a held, full block in the tree under its parent's hash (None: a sequence's first block).

        False if that content is already there under another block, or if the parent has been evicted.
        """
        assert self._states[block] is BlockState.HELD
        known = self._by_hash.get(content_hash)
        if known is not None:
            return known == block
        above = self._by_hash.get(parent) if parent is not None else None
        if parent is not None and above is None:
            return False
        assert block not in self._places, "a block has one content per generation"
        self._places[block] = _Place(content_hash, above)
        self._by_hash[content_hash] = block
        if above is not None:
            self._places[above].children.add(block)
        return True

    def leave_tree(self, blocks: Iterable[int]) -> None:
        """Nobody shall match these blocks any more, nor what follows them: their content is not to be trusted. Owners keep them."""
        for block in blocks:
            if block in self._places:
                self._forget(block)

    def hold(self, blocks: Iterable[int]) -> None:
        """One more owner for blocks that are held already."""
        for block in blocks:
            assert self._states[block] is BlockState.HELD
            self._hold(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less; blocks without any become cached if they are in the tree, else free. Give them in prefix order."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                del self._refs[block]
                self._let_go(block)

    def quarantine(self, blocks: Iterable[int]) -> None:
        """Set aside held blocks of one owner, never entered in the tree, into which late remote writes may still land.

        Ended by `unquarantine` once the transport is quiesced; until then nobody gets them, whatever happens to the peer.
        """
        for block in blocks:
            assert self._refs.pop(block) == 1
            assert block not in self._places
            self._states[block] = BlockState.QUARANTINED
            self._quarantined.add(block)

    def unquarantine(self, blocks: Iterable[int]) -> None:
        """No write can land in these blocks any more: they are free."""
        for block in blocks:
            self._quarantined.remove(block)
            self._to_free(block)

    def drop_cache(self) -> int:
        """All cached blocks become free; how many. Held ones whose ancestors were cached leave the tree, reservations stay."""
        count = len(self._cached)
        while self._cached:
            self._forget(next(iter(self._cached)))
        return count

    def check(self) -> None:
        """Assert every invariant; O(num_blocks), for tests and idle nodes."""
        assert self.counts().balanced(), self.counts()
        assert 0 <= self._reserved <= len(self._free) + len(self._cached)
        assert all(count > 0 for count in self._refs.values())
        self._check_states()
        self._check_tree()

    def _hold(self, block: int) -> None:
        self._cached.pop(block, None)
        self._states[block] = BlockState.HELD
        self._refs[block] = self._refs.get(block, 0) + 1

    def _take(self) -> tuple[int, int]:
        if not self._free:
            self._forget(next(iter(self._cached)))
        block = heapq.heappop(self._free)
        self._generations[block] += 1
        self._hold(block)
        return block, self._generations[block]

    def _let_go(self, block: int) -> None:
        if block in self._places:
            self._to_cache(block)
        else:
            self._to_free(block)

    def _to_free(self, block: int) -> None:
        self._states[block] = BlockState.FREE
        heapq.heappush(self._free, block)

    def _to_cache(self, block: int) -> None:
        self._states[block] = BlockState.CACHED
        self._cached[block] = None
        # A twin of an ancestor may be in the tree in its place, cached while its child was held: using the child used it too.
        above = self._places[block].parent
        while above is not None and above in self._cached:
            self._cached.move_to_end(above)
            above = self._places[above].parent

    def _forget(self, block: int) -> None:
        """Take a block and everything below it out of the tree: cached ones become free, held ones stay with their owners."""
        above = self._places[block].parent
        if above is not None:
            self._places[above].children.remove(block)
        below = [block]
        while below:
            place = self._places.pop(gone := below.pop())
            del self._by_hash[place.content_hash]
            below += place.children
            if self._states[gone] is BlockState.CACHED:
                del self._cached[gone]
                self._to_free(gone)

    def _check_states(self) -> None:
        homes = {
            BlockState.FREE: set(self._free),
            BlockState.CACHED: set(self._cached),
            BlockState.HELD: set(self._refs),
            BlockState.QUARANTINED: self._quarantined,
        }
        assert len(homes[BlockState.FREE]) == len(self._free), "a block is free twice"
        for block, state in enumerate(self._states):
            assert [home for home, blocks in homes.items() if block in blocks] == [state], (block, state)

    def _check_tree(self) -> None:
        age = {block: i for i, block in enumerate(self._cached)}
        assert {place.content_hash: block for block, place in self._places.items()} == self._by_hash
        assert age.keys() <= self._places.keys()
        for block, place in self._places.items():
            assert self._states[block] in (BlockState.CACHED, BlockState.HELD)
            assert all(self._places[child].parent == block for child in place.children)
            if place.parent is not None:
                assert block in self._places[place.parent].children
                assert block not in age or place.parent not in age or age[block] < age[place.parent]
