"""What the failure of an attempt asks for: another one or none, elsewhere or anywhere, and whether the pair is still trusted. Pure.

error of a node                              another attempt?              counts against
────────────────────────────────────────────────────────────────────────────────────────────────────────────
NodeLost of the attempt's own node           up to MAX_LOSSES in a row     nobody
NodeLost of a pull, LeaseLost, Unavailable   yes                           pair, if it was the pull
Cancelled (nobody here did)                  yes                           pair, if it was the pull
DeadlineExceeded of a read or a handshake    yes                           pair
Incompatible, met during a pull              yes                           pair
ResourceExhausted, cause "suspended"         yes: it had been taken in     nobody
ResourceExhausted                            yes, but a 429 before the first token if all are full
unknown_attempt, lost_tokens                 yes: words were lost          nobody
InternalError, InvalidRequest about a pull   MAX_BUGS without progress     pair, if it was the pull
InvalidRequest, cause "logits"               no: the same would come out anywhere
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BatonError, InternalError, InvalidRequest, LeaseLost, NodeLost, NotFound, ResourceExhausted, Unavailable
from router.group import Group

MAX_BUGS = 3  # a request that some bug meets on every node must not go round until its deadline
MAX_LOSSES = 6  # nor one that ends every node it meets until none is left: so many in a row, without a token from decode, are enough
SUSPENDED = "suspended"
UNKNOWN_ATTEMPT = "unknown_attempt"
_PULL_STAGE = "pull"
_SAME_ANYWHERE = "logits"
# A node that ended, in its own words or the router's: the class of an error does not travel, its cause does.
_LOSS_CAUSES = frozenset((NodeLost.default_cause, "rank_silent", "step_stalled"))
_NOT_INTRODUCED = "incarnation"
# A lease that is over, in what decode passes on.
_LEASE_CAUSES = frozenset((LeaseLost.default_cause, _NOT_INTRODUCED, "nonce", "generation", "fenced", "released", "failed", "expired"))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a dispatch came to nothing, and on which group."""

    group: Group
    error: BatonError


def is_bug(error: BatonError) -> bool:
    """Whether something is wrong with Baton, or with one of its nodes, rather than with the request or the weather."""
    strange = isinstance(error, InvalidRequest) and error.stage == _PULL_STAGE  # clients know nothing of pulls
    return strange or (isinstance(error, InternalError) and error.cause != _SAME_ANYWHERE)


def is_loss(error: BatonError) -> bool:
    """Whether the node that had the attempt has ended, perhaps because of it; not that another node could not be reached."""
    return isinstance(error, Unavailable) and error.cause in _LOSS_CAUSES and error.stage != _PULL_STAGE


def worth_another(error: BatonError) -> bool:
    """Whether another attempt may do better; after bugs and losses only so often."""
    return is_bug(error) or not isinstance(error, (InternalError, InvalidRequest, NotFound))


def final(error: BatonError) -> BatonError:
    """What the client is told, once there is no sense in another attempt."""
    if is_loss(error):
        why = f"{MAX_LOSSES} nodes in a row were lost while they had this request; the last: {error.message}"
        return NodeLost(why, stage=error.stage, node=error.node, cause="node_losses", retryable=False)
    if is_bug(error) and not isinstance(error, InternalError):  # nothing that the client could do better
        return InternalError(error.message, stage=error.stage, node=error.node)
    return error


def says_full(error: BatonError) -> bool:
    """Whether a group had no room for one more. A sequence that was suspended had been taken in, so it is resumed, not refused."""
    return isinstance(error, ResourceExhausted) and error.cause != SUSPENDED


def lease_gone(error: BatonError) -> bool:
    """Whether the blocks to pull are gone, so that no other decode group could read them either."""
    return isinstance(error, LeaseLost) or (isinstance(error, Unavailable) and error.cause in _LEASE_CAUSES)


def casts_doubt(error: BatonError) -> bool:
    """Whether a failure says that two nodes do not reach each other: then their pair needs another proof.

    A lease that is gone says nothing about them, unless decode does not know the prefill node at all: it has to be introduced again.
    """
    if lease_gone(error):
        return error.cause == _NOT_INTRODUCED
    return error.stage == _PULL_STAGE and not isinstance(error, ResourceExhausted)
