"""A sequence's life on a decode group, as one table. Stepped by DecodeScheduler alone; docs/lifecycles.md draws it. Pure.

Every stage ends by `give up` (a cancel, a later attempt, the request's deadline, the loss of the router's stream: see ranks/desk.py);
apart from that, and if the prefill node dies now:

    WAITING      by room for it                                      nothing is known of it yet
    ADMITTED     by its pull's first blocks, or `suspend`            the pull fails, and gives it up
    PULLING      by its pull: the last block is verified             the pull fails once no read is under way, and gives it up
    COMPUTING    by the token after its prompt, or `suspend`         it needs none
    RUNNING      by its last token, or `suspend`                     it needs none any more
    ENDING       by the end of the step under way                    -
    QUARANTINED  by its pull, when every rank has said that its read is over; if one never says so, the rank fails: no timer frees a
                 block into which a late byte could still fall
"""

from __future__ import annotations

import enum

from baton.lifecycle import Lifecycle


class Stage(enum.Enum):
    """Where a sequence is in its life on a decode group."""

    WAITING = "waiting"  # for room
    ADMITTED = "admitted"  # room is promised, nothing is bound, nothing can land
    PULLING = "pulling"  # blocks are bound, and what is read lands in them
    COMPUTING = "computing"  # its prompt, here
    RUNNING = "running"  # one token per step
    ENDING = "ending"  # over; the step under way writes its blocks
    QUARANTINED = "quarantined"  # over; reads under way may write its blocks
    ENDED = "ended"


class SequenceEvent(enum.Enum):
    """What can happen to a sequence."""

    ADMIT = "admit"
    ADMIT_ALONE = "admit alone"  # without a lease
    BIND = "bind"
    PULLED = "pulled"  # all blocks are here and verified
    TOKEN = "token"
    FINISH = "finish"  # that was the last one
    FAIL = "no token can be drawn"
    SUSPEND = "suspend"
    GIVE_UP = "give up"  # cancelled, replaced, out of time, or its pull failed
    GIVE_UP_IN_STEP = "give up during a step"
    GIVE_UP_IN_READ = "give up during a read"
    STEP_DONE = "step done"
    QUIESCED = "quiesced"  # no read is under way any more


COMPUTE = (Stage.COMPUTING, Stage.RUNNING)  # take part in steps
SEQUENCE_LIFE = Lifecycle(
    "sequence on decode",
    Stage.WAITING,
    {
        (Stage.WAITING, SequenceEvent.ADMIT): Stage.ADMITTED,
        (Stage.WAITING, SequenceEvent.ADMIT_ALONE): Stage.COMPUTING,
        (Stage.ADMITTED, SequenceEvent.BIND): Stage.PULLING,
        (Stage.PULLING, SequenceEvent.BIND): Stage.PULLING,
        (Stage.PULLING, SequenceEvent.PULLED): Stage.RUNNING,
        (Stage.COMPUTING, SequenceEvent.TOKEN): Stage.RUNNING,
        (Stage.RUNNING, SequenceEvent.TOKEN): Stage.RUNNING,
        (Stage.RUNNING, SequenceEvent.FINISH): Stage.ENDED,
        **{(stage, SequenceEvent.SUSPEND): Stage.ENDED for stage in (Stage.ADMITTED, *COMPUTE)},
        **{(stage, SequenceEvent.FAIL): Stage.ENDED for stage in COMPUTE},
        **{(stage, SequenceEvent.GIVE_UP): Stage.ENDED for stage in (Stage.WAITING, Stage.ADMITTED, Stage.PULLING, *COMPUTE)},
        **{(stage, SequenceEvent.GIVE_UP_IN_STEP): Stage.ENDING for stage in COMPUTE},
        (Stage.PULLING, SequenceEvent.GIVE_UP_IN_READ): Stage.QUARANTINED,
        (Stage.ENDING, SequenceEvent.STEP_DONE): Stage.ENDED,
        (Stage.QUARANTINED, SequenceEvent.QUIESCED): Stage.ENDED,
    },
)
