"""One pull as a state machine: a prompt's blocks on their way from a prefill node into this group. Pure: no clock, no I/O.

Owned by one task of `Intake`, which does what a state asks for and reports what came of it. What a source announces is checked here,
against the prompt and against what it said before: a peer that contradicts itself, by mistake or on purpose, is refused.

    state      ends, at the latest, by                         if the prefill node dies now           if the sequence is given up now
    REACHING   the deadlines of reaching its ranks             FAILED: nothing is bound               CANCELLED
    OPENING    the handshake deadline                          FAILED: no answer, or a broken stream  CANCELLED
    LISTENING  an announcement; the request's deadline or a    FAILED: the stream breaks, at once or  CANCELLED: every read that was
               cancel, both of which end the whole sequence    by keepalive within 15 s               begun has been verified
    READING    the read's deadline, on every rank              FAILED, once every rank's read ended   DRAINING
    DRAINING   the same                                        CANCELLED, when the reads have ended   -
    RELEASING  the handshake deadline                          DONE                                   it goes on; only the node's end
                                                                                                      cuts it short: DONE

While READING and DRAINING bytes may land in bound blocks: these are nobody else's until all ranks have said that their reads are over,
well or badly. If one does not say so in time (it is stopped, cut off or dead), the pull is LOST: the blocks stay where they are, and
the rank fails, for nothing but its end can free them. (The source is told that the pull is over, and may use its own blocks again:
a read of them that is still under way finds other generations, and is not verified.)

From RELEASING on all blocks are here and verified, and the sequence runs: a release that fails or is not answered starts nothing
again, the lease ends by its own expiry.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from baton.errors import BatonError
from baton.lifecycle import Lifecycle
from baton.request import SequenceRequest
from kv_transfer.lease import Announced, FinalToken
from kv_transfer.nonsense import nonsense


class PullState(enum.Enum):
    """Where a pull is; see the table above."""

    REACHING = "reaching"
    OPENING = "opening"
    LISTENING = "listening"
    READING = "reading"
    DRAINING = "draining"
    RELEASING = "releasing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


class PullEvent(enum.Enum):
    """What can happen to a pull."""

    REACHED = "reached"  # every rank of the group knows how to read
    QUEUED = "queued"  # the source has answered
    ANNOUNCED = "announced"  # blocks can be read, which begins now
    VERIFIED = "verified"  # they are here; more will be announced
    COMPLETE = "complete"  # all are here, and the sequence has its first token
    RELEASED = "released"
    NOT_RELEASED = "release failed"
    FAIL = "fail"
    CANCEL = "cancel"
    QUIESCED = "quiesced"  # every rank has said that its read is over
    UNACKNOWLEDGED = "unacknowledged"  # a rank has not said so in time


_CAN_FAIL = (PullState.REACHING, PullState.OPENING, PullState.LISTENING, PullState.READING)
_QUIET = (PullState.REACHING, PullState.OPENING, PullState.LISTENING)  # no read has been begun that is not verified
_LANDING = (PullState.READING, PullState.DRAINING)
PULL_LIFE = Lifecycle(
    "pull",
    PullState.REACHING,
    {
        (PullState.REACHING, PullEvent.REACHED): PullState.OPENING,
        (PullState.OPENING, PullEvent.QUEUED): PullState.LISTENING,
        (PullState.LISTENING, PullEvent.ANNOUNCED): PullState.READING,
        (PullState.READING, PullEvent.VERIFIED): PullState.LISTENING,
        (PullState.READING, PullEvent.COMPLETE): PullState.RELEASING,
        (PullState.RELEASING, PullEvent.RELEASED): PullState.DONE,
        (PullState.RELEASING, PullEvent.NOT_RELEASED): PullState.DONE,
        (PullState.RELEASING, PullEvent.CANCEL): PullState.DONE,
        **{(state, PullEvent.FAIL): PullState.FAILED for state in _CAN_FAIL},
        **{(state, PullEvent.CANCEL): PullState.CANCELLED for state in _QUIET},
        (PullState.READING, PullEvent.CANCEL): PullState.DRAINING,
        (PullState.DRAINING, PullEvent.QUIESCED): PullState.CANCELLED,
        **{(state, PullEvent.UNACKNOWLEDGED): PullState.LOST for state in _LANDING},
    },
)


@dataclass(frozen=True, slots=True)
class Portion:
    """Some of the announced blocks, to be read with one deadline: their ids and generations at the source."""

    block_ids: tuple[int, ...]
    generations: tuple[int, ...]


class PullLife:
    """One pull's state and what its source has said so far. State owner: the pull's task.

    The first `matched_blocks` of the prompt's num_blocks are here already. vocab_size: token ids are below it. source: for messages.
    """

    def __init__(self, request: SequenceRequest, matched_blocks: int, num_blocks: int, *, vocab_size: int, source: str) -> None:
        self.state = PULL_LIFE.start
        self.final: FinalToken | None = None
        self._request = request
        self._next_block = matched_blocks
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._source = source

    def on(self, event: PullEvent) -> None:
        """The only way to change the state; raises InternalError for an event that cannot happen in it."""
        self.state = PULL_LIFE.after(self.state, event)

    @property
    def yields(self) -> bool:
        """Whether giving the sequence up is the pull's business: until its blocks are here."""
        return self.state in _CAN_FAIL or self.state is PullState.DRAINING

    def announced(self, announced: Announced) -> None:
        """The source has announced blocks: they are READING now. Raises Incompatible, and changes nothing, if that cannot be true."""
        end = announced.first_block + len(announced.block_ids)
        if announced.first_block != self._next_block:
            raise self._nonsense(f"announces block {announced.first_block} of the prompt where {self._next_block} follows")
        if end > self._num_blocks:
            raise self._nonsense(f"announces {end} blocks of a prompt that has {self._num_blocks}")
        if announced.final is not None:
            self._check_final(announced.final, end)
        elif not announced.block_ids:
            raise self._nonsense("announces nothing")
        self.on(PullEvent.ANNOUNCED)
        self._next_block = end
        self.final = announced.final

    def _check_final(self, final: FinalToken, num_blocks: int) -> None:
        sampling, index = self._request.sampling, len(self._request.emitted_ids)
        if num_blocks != self._num_blocks:
            raise self._nonsense(f"has announced {num_blocks} of the prompt's {self._num_blocks} blocks, and calls that all")
        if final.output_index != index:
            raise self._nonsense(f"has drawn output token {final.output_index}, not {index}")
        if not 0 <= final.token_id < self._vocab_size:
            raise self._nonsense(f"has drawn token {final.token_id} of a vocabulary of {self._vocab_size}")
        if final.finish_reason is not sampling.finish(index + 1, final.token_id):
            raise self._nonsense(f"says that its token {final.token_id} ends the request with {final.finish_reason}")
        if not self._right_logprob(final):
            raise self._nonsense(f"has drawn token {final.token_id} with other log-probabilities than asked for")

    def _right_logprob(self, final: FinalToken) -> bool:
        wanted = self._request.sampling.num_logprobs
        if final.logprob is None or wanted is None:
            return final.logprob is None and wanted is None
        top_ids = [token_id for token_id, _ in final.logprob.top]
        return final.logprob.token_id == final.token_id and len(top_ids) <= wanted and all(0 <= i < self._vocab_size for i in top_ids)

    def _nonsense(self, what: str) -> BatonError:
        return nonsense(f"the source at {self._source} {what}", node=self._source)


def portions(announced: Announced, most_blocks: int) -> Iterator[Portion]:
    """The announced blocks in order, at most so many at once: a read's time limit is for a bounded number of bytes."""
    for at in range(0, len(announced.block_ids), most_blocks):
        some = slice(at, at + most_blocks)
        yield Portion(announced.block_ids[some], announced.generations[some])
