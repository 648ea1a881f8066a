"""What the schedulers of both roles share: one sequence's tokens and blocks, and the line in which sequences wait. Pure.

Knows the block pool and the batch's plain rows; knows neither leases nor pulls.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from baton.engine.batch import Sampled, SampleRow
from baton.engine.blocks import BlockPool, blocks_for, chain_hashes, next_hash, root_hash
from baton.errors import InvalidRequest
from baton.request import SequenceRequest, TokenEvent, TokenLogprob

Key = tuple[str, int]
Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt's tokens and the blocks that hold their KV. Whoever made it ends it with `drop`.

    token_ids: prompt, emitted tokens and what was generated here. Slots of tokens 0 .. num_computed - 1 in block_ids are filled.
    hashes: of the leading full blocks, as far as known; num_entered of them were offered to the prefix tree.
    reserved: blocks promised by the pool and not yet taken. num_matched: leading blocks found in the prefix tree.
    """

    request: SequenceRequest
    token_ids: list[int]
    hashes: list[bytes]
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_matched: int = 0
    num_entered: int = 0
    reserved: int = 0

    @classmethod
    def make(cls, request: SequenceRequest, block_size: int) -> Sequence:
        """A sequence without blocks. O(tokens): hashes every full block."""
        token_ids = [*request.prompt_ids, *request.emitted_ids]
        return cls(request, token_ids, list(chain_hashes(token_ids, block_size)))

    def fits(self, pool: BlockPool, num_blocks: int) -> bool:
        """Whether `begin` would succeed."""
        return pool.fits(self._prefix(pool), num_blocks)

    def begin(self, pool: BlockPool, num_blocks: int) -> bool:
        """Hold the cached prefix and reserve the rest of `num_blocks`; False, with nothing changed, if they do not fit."""
        assert not self.block_ids
        if not self.fits(pool, num_blocks):
            return False
        self.block_ids = list(pool.match(self._prefix(pool)))
        self.num_matched = self.num_entered = len(self.block_ids)
        self.num_computed = self.num_matched * pool.block_size
        self.reserved = num_blocks - self.num_matched
        fitted = pool.reserve(self.reserved)
        assert fitted, "fits() and match() disagree"
        return True

    def num_uncached(self, pool: BlockPool) -> int:
        """Tokens that would have to be computed if it began now."""
        return len(self.token_ids) - pool.peek(self._prefix(pool)) * pool.block_size

    def _prefix(self, pool: BlockPool) -> list[bytes]:
        # Never the block of the last token: that one is always computed, into a block of this sequence's own.
        return self.hashes[: (len(self.token_ids) - 1) // pool.block_size]

    def extend(self, pool: BlockPool, count: int) -> tuple[tuple[int, int], ...]:
        """Take `count` more blocks, from the reservation first; (block, generation) of each."""
        promised = min(count, self.reserved)
        taken = pool.take(promised, reserved=True)
        if count > promised:
            taken += pool.take(count - promised, reserved=False)
        self.reserved -= promised
        self.block_ids += (block for block, _ in taken)
        return taken

    def enter_tree(self, pool: BlockPool) -> None:
        """Offer every full block that is computed and was not offered yet to the prefix tree."""
        for i in range(self.num_entered, self.num_computed // pool.block_size):
            parent = self.hashes[i - 1] if i else None
            if i == len(self.hashes):
                content = self.token_ids[i * pool.block_size : (i + 1) * pool.block_size]
                self.hashes.append(next_hash(parent or root_hash(), content))
            pool.insert(self.block_ids[i], self.hashes[i], parent)
            self.num_entered += 1

    def distrust(self, pool: BlockPool) -> None:
        """No token could be drawn: nothing that was written here may reach others through the tree, also not by earlier chunks, whose
        numbers nobody has looked at. What was found in the tree was good for others. The sequence must be dropped next."""
        pool.leave_tree(self.block_ids[self.num_matched :])

    def drop(self, pool: BlockPool) -> None:
        """Give up all blocks and promises: full blocks stay cached, the sequence is as it was made (but for its tokens)."""
        pool.release(self.block_ids)
        pool.unreserve(self.reserved)
        self.block_ids = []
        self.num_computed = self.num_matched = self.num_entered = self.reserved = 0

    def sample_row(self) -> SampleRow:
        """How to draw the token after the last one."""
        sampling = self.request.sampling
        output_index = len(self.token_ids) - len(self.request.prompt_ids)
        return SampleRow(
            seed=sampling.seed,
            output_index=output_index,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            num_logprobs=sampling.num_logprobs,
            banned_ids=sampling.stop_token_ids if output_index < sampling.min_tokens else (),
        )

    def event(self, sampled: Sampled, row: int, cached_tokens: int | None = None) -> TokenEvent:
        """What row `row` of a step drew as the token after the last one. Does not append it."""
        output_index = len(self.token_ids) - len(self.request.prompt_ids)
        token_id = int(sampled.token_ids[row])
        return TokenEvent(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            output_index=output_index,
            token_ids=(token_id,),
            logprobs=_logprobs(sampled, row, self.request.sampling.num_logprobs),
            finish_reason=self.request.sampling.finish(output_index + 1, token_id),
            cached_tokens=cached_tokens,
        )


def _logprobs(sampled: Sampled, row: int, num_logprobs: int | None) -> tuple[TokenLogprob, ...]:
    if num_logprobs is None:
        return ()
    ids, values = sampled.top_ids[row, :num_logprobs].tolist(), sampled.top_logprobs[row, :num_logprobs].tolist()
    return (TokenLogprob(int(sampled.token_ids[row]), float(sampled.logprobs[row]), tuple(zip(ids, values, strict=True))),)


def check_sequence(request: SequenceRequest, *, num_slots: int, max_model_len: int, pool: BlockPool, stage: str) -> None:
    """Raise InvalidRequest for a sequence that could never run here: num_slots are the token slots it may need at once."""

    def refuse(why: str) -> InvalidRequest:
        return InvalidRequest(f"request {request.request_id}: {why}", stage=stage)

    num_tokens = len(request.prompt_ids) + len(request.emitted_ids)
    if num_tokens == 0:
        raise refuse("prompt is empty")
    if len(request.emitted_ids) >= request.sampling.max_tokens:
        raise refuse(f"all of its {request.sampling.max_tokens} max_tokens were emitted before")
    if num_tokens >= max_model_len:
        raise refuse(f"prompt has {num_tokens} tokens, at most {max_model_len - 1} leave room for an answer")
    if blocks_for(num_slots, pool.block_size) > pool.num_blocks:
        raise refuse(f"{num_slots} tokens do not fit in {pool.num_blocks} blocks of {pool.block_size}")


class Answer(enum.Enum):
    """What became of a sequence whose turn it was."""

    STARTED = enum.auto()
    NO_ROOM = enum.auto()
    NOT_YET = enum.auto()
    STEP_FULL = enum.auto()


@dataclass(slots=True)
class _Place(Generic[Item]):
    arrival: int
    item: Item
    size: int
    num_tokens: int
    overtaken: int = 0


class WaitingLine(Generic[Item]):
    """Who waits to be started, by arrival. State owner: the scheduler that made it, which also ends what is in it.

    One that finds no room does not hold up those behind it, until younger ones have overtaken it `age_limit` times: from then on
    it has the first turn, and nobody starts before it does. num_tokens: of all who wait.
    """

    def __init__(self, age_limit: int) -> None:
        self.num_tokens = 0
        self._age_limit = age_limit
        self._places: list[_Place[Item]] = []  # by arrival
        self._by_size: list[tuple[int, int, _Place[Item]]] = []  # size, arrival
        self._aged: set[int] = set()  # arrivals of those that were overtaken too often

    def __len__(self) -> int:
        return len(self._places)

    def items(self) -> Iterator[Item]:
        """Who waits, oldest first. Not to be used any more once somebody has joined or left."""
        return (place.item for place in self._places)

    @property
    def least_size(self) -> int:
        """Of all who wait; there must be somebody."""
        return self._by_size[0][0]

    def join(self, arrival: int, item: Item, *, size: int = 0, num_tokens: int = 0) -> None:
        """Stand where `arrival` belongs. An item that waits again keeps its old number. size: for turns, and for `least_size`."""
        place = _Place(arrival, item, size, num_tokens)
        bisect.insort(self._places, place, key=_arrival)
        bisect.insort(self._by_size, (size, arrival, place))
        self.num_tokens += num_tokens

    def leave(self, arrival: int) -> None:
        """The item of this number waits no longer."""
        place = self._places.pop(bisect.bisect_left(self._places, arrival, key=_arrival))
        assert place.arrival == arrival
        del self._by_size[bisect.bisect_left(self._by_size, (place.size, arrival))]
        self._aged.discard(arrival)
        self.num_tokens -= place.num_tokens

    def serve(self, start: Callable[[Item], Answer]) -> None:
        """Try to start everyone, by arrival. Those that started are no longer in line.

        O(who is asked): a long line in which nobody finds room is cheap to look through, which is done at every event.
        """
        self._serve(start, self._places)

    def serve_by_size(self, start: Callable[[Item], Answer], elders: Collection[int], asked: Callable[[Item], bool]) -> None:
        """Try to start everyone: first those of these arrivals, the oldest first, and then by size, the least first. Those that started
        are no longer in line. asked: who need not be asked, for the answer would be NOT_YET, is passed over.
        """
        self._serve(start, self._in_turn(elders, asked))

    def _serve(self, start: Callable[[Item], Answer], in_turn: Iterable[_Place[Item]]) -> None:
        passed: list[_Place[Item]] = []
        started: list[int] = []
        held_up = False  # by one that was passed, and overtaken too often
        for place in in_turn:
            answer = start(place.item)
            if answer is Answer.STEP_FULL:
                break
            if answer is Answer.NO_ROOM:
                self._overtake([place], sum(arrival > place.arrival for arrival in started))
                passed.append(place)
                held_up = place.arrival in self._aged
            if answer is Answer.STARTED:
                started.append(place.arrival)
                self._overtake([other for other in passed if other.arrival < place.arrival], 1)
                held_up = any(other.arrival in self._aged for other in passed)
            if held_up:
                break
        for arrival in started:
            self.leave(arrival)

    def first(self) -> Iterator[Item]:
        """Those before whom nobody starts, if there are any; else everyone. Oldest first; as `items`."""
        return (place.item for place in self._places if not self._aged or place.arrival in self._aged)

    def _overtake(self, places: list[_Place[Item]], times: int) -> None:
        for place in places:
            place.overtaken += times
            if self._age_limit <= place.overtaken:
                self._aged.add(place.arrival)

    def _in_turn(self, elders: Collection[int], asked: Callable[[Item], bool]) -> Iterator[_Place[Item]]:
        aged = frozenset(self._aged)
        yield from (self._place(arrival) for arrival in sorted(aged))
        yield from (self._place(arrival) for arrival in sorted(elders) if arrival not in aged)
        first = aged.union(elders)
        for _, arrival, place in self._by_size:
            if asked(place.item) and arrival not in first:
                yield place

    def _place(self, arrival: int) -> _Place[Item]:
        place = self._places[bisect.bisect_left(self._places, arrival, key=_arrival)]
        assert place.arrival == arrival
        return place


def _arrival(place: _Place[Any]) -> int:
    return place.arrival
