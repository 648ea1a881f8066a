"""The block pool against its region map: no block lost, none with two owners, promises kept, the tree a tree."""

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule

from baton.engine.blocks import BlockPool, BlockState, blocks_for, chain_hashes, next_hash, root_hash
from baton.errors import ResourceExhausted
from baton.request import BlockCounts

SIZE = 2


def filled(pool, token_ids, *, release=True):
    """Take, enter and perhaps release the blocks of a prompt; the blocks."""
    hashes = chain_hashes(token_ids, SIZE)
    blocks = [block for block, _ in pool.take(len(hashes), reserved=False)]
    for i, block in enumerate(blocks):
        pool.insert(block, hashes[i], hashes[i - 1] if i else None)
    if release:
        pool.release(blocks)
    pool.check()
    return blocks


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(1, 5), st.binary(max_size=4))
def test_a_hash_names_its_block_and_all_before_it(token_ids, block_size, salt):
    hashes = chain_hashes(token_ids, block_size, salt)
    assert len(hashes) == len(token_ids) // block_size
    assert len(set(hashes)) == len(hashes)
    assert chain_hashes(token_ids, block_size, salt, num_blocks=1) == hashes[:1]
    assert hashes == () or chain_hashes([token_ids[0] ^ 1, *token_ids[1:]], block_size, salt)[-1] != hashes[-1]
    assert hashes == () or chain_hashes(token_ids, block_size, salt + b"x")[0] != hashes[0]


def test_hashes_are_the_same_on_every_node():
    root = hashlib.blake2b(b"baton.block.", digest_size=16).digest()
    first = hashlib.blake2b(root + struct.pack("<2I", 7, 2**31), digest_size=16).digest()
    assert chain_hashes([7, 2**31, 5], 2) == (first,) == (next_hash(root_hash(), [7, 2**31]),)
    assert first.hex() == "3312286139e2a55f1636bba5dfb9dfae"


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_blocks_for_rounds_up(num_tokens, num_blocks):
    assert blocks_for(num_tokens, SIZE) == num_blocks


def test_lowest_numbers_first_and_generations_grow():
    pool = BlockPool(4, SIZE)
    assert pool.take(3, reserved=False) == ((0, 1), (1, 1), (2, 1))
    pool.release([0, 1, 2])
    assert pool.take(2, reserved=False) == ((0, 2), (1, 2))
    assert [pool.generation(block) for block in range(4)] == [2, 2, 1, 0]
    assert pool.counts() == BlockCounts(total=4, free=2, cached=0, held=2, quarantined=0)


def test_take_refuses_what_was_promised_to_another():
    pool = BlockPool(3, SIZE)
    assert pool.reserve(2)
    assert not pool.reserve(2)
    with pytest.raises(ResourceExhausted, match="2 KV blocks wanted, 1 of 3 available"):
        pool.take(2, reserved=False)
    assert len(pool.take(1, reserved=False)) == 1
    assert len(pool.take(1, reserved=True)) == 1
    pool.unreserve(1)
    assert pool.available() == 1


def test_match_stops_where_a_promise_would_break():
    pool = BlockPool(4, SIZE)
    hashes = chain_hashes(range(6), SIZE)
    filled(pool, range(6))
    assert pool.reserve(2)
    assert pool.peek(hashes) == 3
    assert not pool.fits(hashes, 3)
    assert pool.fits(hashes, 2)
    assert pool.match(hashes) == (0, 1)
    assert pool.match(hashes) == (0, 1)
    pool.check()
    assert pool.fits(hashes, 2), "blocks that are held already cost nothing"
    assert {block for block, _ in pool.take(2, reserved=True)} == {2, 3}


def test_match_respects_its_limit():
    pool = BlockPool(4, SIZE)
    filled(pool, range(6))
    assert pool.match(chain_hashes(range(6), SIZE), limit=1) == (0,)


def test_eviction_is_least_recently_used_and_children_first():
    pool = BlockPool(5, SIZE)
    filled(pool, [1, 1, 2, 2])  # blocks 0, 1
    filled(pool, [3, 3, 4, 4])  # blocks 2, 3
    pool.release(pool.match(chain_hashes([1, 1], SIZE)))  # the first prompt's root is now the most recently used
    assert [block for block, _ in pool.take(4, reserved=False)] == [4, 1, 3, 2]
    pool.check()
    assert pool.peek(chain_hashes([1, 1, 2, 2], SIZE)) == 1


def test_a_twin_is_not_entered_but_its_children_are():
    pool = BlockPool(4, SIZE)
    a, x, y = chain_hashes([1, 1], SIZE)[0], chain_hashes([1, 1, 2, 2], SIZE)[1], chain_hashes([1, 1, 3, 3], SIZE)[1]
    (one, _), (two, _), (twin, _), (other, _) = pool.take(4, reserved=False)
    assert pool.insert(one, a, None)
    assert pool.insert(one, a, None)
    assert pool.insert(two, x, a)
    assert not pool.insert(twin, a, None)
    assert pool.insert(other, y, a)
    pool.release([one, two])
    pool.release([twin, other])
    pool.check()
    assert pool.state(twin) is BlockState.FREE
    # Using `other` used its parent too: `two` is older than both, and the parent is last.
    assert [block for block, _ in pool.take(4, reserved=False)] == [twin, two, other, one]


def test_evicting_a_parent_takes_held_children_out_of_the_tree():
    pool = BlockPool(3, SIZE)
    hashes = chain_hashes([1, 1, 2, 2, 3, 3], SIZE)
    (one, _), (twin, _), (child, _) = pool.take(3, reserved=False)
    pool.insert(one, hashes[0], None)
    assert not pool.insert(twin, hashes[0], None)
    pool.insert(child, hashes[1], hashes[0])
    pool.release([one])
    assert pool.take(1, reserved=False) == ((one, 2),)
    pool.check()
    assert pool.peek(hashes) == 0
    assert not pool.insert(one, hashes[2], hashes[1]), "its parent is gone"
    pool.release([twin, child])
    assert pool.state(child) is BlockState.FREE


def test_evicting_may_free_cached_blocks_below_a_held_one():
    pool = BlockPool(4, SIZE)
    hashes = chain_hashes([1, 1, 2, 2, 3, 3], SIZE)
    (one, _), (twin, _), (child, _), (grandchild, _) = pool.take(4, reserved=False)
    pool.insert(one, hashes[0], None)
    pool.insert(child, hashes[1], hashes[0])
    pool.insert(grandchild, hashes[2], hashes[1])
    pool.release([one])
    pool.release([grandchild])
    assert pool.take(1, reserved=False) == ((one, 2),)
    pool.check()
    assert pool.state(grandchild) is BlockState.FREE
    pool.release([twin, child])
    assert pool.counts().free == 3


def test_shared_blocks_are_cached_only_when_the_last_owner_lets_go():
    pool = BlockPool(2, SIZE)
    blocks = filled(pool, [1, 1], release=False)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.state(blocks[0]) is BlockState.HELD
    pool.release(blocks)
    assert pool.state(blocks[0]) is BlockState.CACHED


def test_quarantined_blocks_are_nobodys_until_quiesced():
    pool = BlockPool(2, SIZE)
    blocks = [block for block, _ in pool.take(2, reserved=False)]
    pool.quarantine(blocks)
    pool.check()
    assert pool.available() == 0
    assert pool.counts().quarantined == 2
    pool.unquarantine(blocks)
    pool.check()
    assert pool.counts().free == 2


def test_dropping_the_cache_leaves_held_blocks_alone():
    pool = BlockPool(4, SIZE)
    held = filled(pool, [9, 9], release=False)
    filled(pool, [1, 1, 2, 2])
    assert pool.drop_cache() == 2
    pool.check()
    assert pool.counts() == BlockCounts(total=4, free=3, cached=0, held=1, quarantined=0)
    pool.release(held)
    assert pool.counts().cached == 1


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=10), max_size=4), st.integers(0, 4))
def test_nothing_is_found_after_the_cache_was_dropped_but_what_is_held(prompts, num_held):
    pool = BlockPool(40, SIZE)
    for prompt in prompts:
        filled(pool, prompt)
    held = pool.match(chain_hashes(prompts[0], SIZE), limit=num_held) if prompts else ()
    cached = pool.counts().cached
    assert (pool.drop_cache(), pool.drop_cache()) == (cached, 0)
    pool.check()
    for prompt in prompts:
        hashes = chain_hashes(prompt, SIZE)
        shared = sum(1 for mine, other in zip(hashes, chain_hashes(prompts[0], SIZE), strict=False) if mine == other)
        assert pool.peek(hashes) == min(shared, len(held))
    pool.release(held)
    assert pool.counts().cached == len(held)


class PoolMachine(RuleBasedStateMachine):
    """Random owners against a pool; promises and ownership are modelled beside it."""

    owners = Bundle("owners")
    promises = Bundle("promises")

    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks):
        self.pool = BlockPool(num_blocks, SIZE)
        self.owned = []
        self.promised = 0
        self.generations = [0] * num_blocks
        self.contents = set()

    @rule(target=promises, count=st.integers(0, 6))
    def reserve(self, count):
        fits = count <= self.pool.available()
        assert self.pool.reserve(count) is fits
        self.promised += count if fits else 0
        return count if fits else multiple()

    @rule(count=consumes(promises))
    def unreserve(self, count):
        self.pool.unreserve(count)
        self.promised -= count

    @rule(target=owners, count=consumes(promises))
    def spend(self, count):
        self.promised -= count
        return self.taken(self.pool.take(count, reserved=True), count)

    @rule(target=owners, count=st.integers(0, 5))
    def take(self, count):
        if count > self.pool.available():
            with pytest.raises(ResourceExhausted):
                self.pool.take(count, reserved=False)
            return multiple()
        return self.taken(self.pool.take(count, reserved=False), count)

    def taken(self, pairs, count):
        assert len({block for block, _ in pairs}) == count
        for block, generation in pairs:
            assert generation > self.generations[block]
            self.generations[block] = generation
            assert not any(block in blocks for blocks in self.owned), "written while someone else owns it"
        owner = [block for block, _ in pairs]
        self.owned.append(owner)
        return owner

    @rule(target=owners, prompt=st.lists(st.integers(0, 1), min_size=2, max_size=10))
    def match(self, prompt):
        hashes = chain_hashes(prompt, SIZE)
        would, most = self.pool.peek(hashes), self.pool.available()
        blocks = list(self.pool.match(hashes))
        assert len(blocks) <= would
        assert len(blocks) == would or self.pool.available() == 0 <= most
        self.owned.append(blocks)
        return blocks

    @rule(prompt=st.lists(st.integers(0, 1), min_size=2, max_size=10), more=st.integers(0, 3))
    def fits_is_exact(self, prompt, more):
        hashes = chain_hashes(prompt, SIZE)
        count = len(hashes) + more
        fits = self.pool.fits(hashes, count)
        blocks = self.pool.match(hashes)
        assert self.pool.reserve(count - len(blocks)) is fits
        if fits:
            self.pool.unreserve(count - len(blocks))
        self.pool.release(blocks)

    @rule(owner=owners, prompt=st.lists(st.integers(0, 1), min_size=8, max_size=8))
    def enter(self, owner, prompt):
        """A step has filled an owner's blocks; those in the tree already keep their content."""
        hashes = chain_hashes(prompt, SIZE)
        mine = any(owner is other for other in self.owned)
        if not mine or self.entered(owner):
            return
        for i, (block, content_hash) in enumerate(zip(owner, hashes, strict=False)):
            if self.pool.insert(block, content_hash, hashes[i - 1] if i else None):
                self.contents.add((block, self.generations[block]))

    def entered(self, owner):
        return any((block, self.generations[block]) in self.contents for block in owner)

    @rule(owner=consumes(owners))
    def release(self, owner):
        self.disown(owner)
        self.pool.release(owner)

    @rule(owner=consumes(owners))
    def hold_and_release(self, owner):
        self.disown(owner)
        self.pool.hold(owner)
        self.pool.release(owner)
        self.pool.release(owner)

    def disown(self, owner):
        self.owned = [other for other in self.owned if other is not owner]

    @rule(owner=consumes(owners))
    def quarantine(self, owner):
        shared = any(block in other for other in self.owned if other is not owner for block in owner)
        self.disown(owner)
        if shared or self.entered(owner):
            self.pool.release(owner)
            return
        self.pool.quarantine(owner)
        self.pool.check()
        self.pool.unquarantine(owner)

    @rule(owner=owners)
    def leave_tree(self, owner):
        """What an owner wrote is not to be trusted: it goes, and what follows it, but never from those that hold it."""
        if any(owner is other for other in self.owned):
            before = self.pool.counts()
            self.pool.leave_tree(owner)
            assert not any(block in self.pool._places for block in owner)
            after = self.pool.counts()
            assert (after.held, after.quarantined) == (before.held, before.quarantined)

    @precondition(lambda self: self.pool.counts().cached)
    @rule()
    def drop_cache(self):
        before = self.pool.counts()
        assert self.pool.drop_cache() == before.cached
        after = self.pool.counts()
        assert (after.free, after.cached) == (before.free + before.cached, 0)
        assert (after.held, after.quarantined) == (before.held, before.quarantined)

    @invariant()
    def sound(self):
        self.pool.check()
        held = {block for blocks in self.owned for block in blocks}
        assert {block for block in range(self.pool.num_blocks) if self.pool.state(block) is BlockState.HELD} == held
        assert self.pool.available() == self.pool.counts().free + self.pool.counts().cached - self.promised


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
