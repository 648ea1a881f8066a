"""What each failure asks for: the table in router/failures.py, row by row."""

import pytest

from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    LeaseLost,
    NodeLost,
    NotFound,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from router.failures import casts_doubt, is_bug, lease_gone, says_full, worth_another

WEATHER = [NodeLost, LeaseLost, Unavailable, Cancelled, DeadlineExceeded, Incompatible, ResourceExhausted]


@pytest.mark.parametrize("kind", WEATHER)
@pytest.mark.parametrize("stage", ["prefill", "pull", "decode", "router"])
def test_what_a_node_or_a_link_did_is_tried_again(kind: type[BatonError], stage: str) -> None:
    error = kind("so it goes", stage=stage)
    assert worth_another(error)
    assert not is_bug(error)


@pytest.mark.parametrize(
    "error",
    [InternalError("step failed", stage="decode"), InternalError("NaN", stage="pull"), InvalidRequest("block 9 is outside", stage="pull")],
)
def test_a_bug_of_a_node_may_not_be_one_of_another(error: BatonError) -> None:
    assert is_bug(error)
    assert worth_another(error)


@pytest.mark.parametrize(
    "error",
    [
        InternalError("the logits are not finite", stage="decode", cause="logits"),
        InvalidRequest("too long", stage="prefill"),
        InvalidRequest("too long", stage="decode"),
        TooLarge("too large"),
        NotFound("no such model"),
    ],
)
def test_what_would_be_the_same_anywhere_is_not(error: BatonError) -> None:
    assert not worth_another(error)
    assert not is_bug(error)


def test_full_is_who_took_nothing_in() -> None:
    assert says_full(ResourceExhausted("0 of 64 blocks", cause="blocks"))
    assert not says_full(ResourceExhausted("suspended: all blocks are in use", cause="suspended"))
    assert not says_full(Unavailable("gone"))


@pytest.mark.parametrize("cause", ["", "incarnation", "nonce", "generation", "fenced", "released", "failed", "expired"])
def test_a_lease_that_is_gone_is_known_by_its_cause_when_its_class_did_not_travel(cause: str) -> None:
    assert lease_gone(LeaseLost("gone", stage="pull", cause=cause))
    assert lease_gone(Unavailable("gone", stage="pull", cause=cause)) == bool(cause)
    assert not lease_gone(InternalError("gone", stage="pull", cause=cause))


@pytest.mark.parametrize(
    ("error", "doubt"),
    [
        (NodeLost("no answer", stage="pull", cause="handshake"), True),
        (Unavailable("connection refused", stage="pull"), True),
        (DeadlineExceeded("30 s for one read", stage="pull"), True),
        (Incompatible("another block size", stage="pull"), True),
        (InternalError("cannot map the pool", stage="pull"), True),
        (LeaseLost("never met", stage="pull", cause="incarnation"), True),
        (LeaseLost("other content", stage="pull", cause="generation"), False),
        (LeaseLost("revoked", stage="pull"), False),
        (ResourceExhausted("4096 leases are held", stage="pull", cause="leases"), False),
        (NodeLost("the stream broke", stage="router"), False),
        (InternalError("step failed", stage="decode"), False),
    ],
)
def test_only_a_pull_says_that_two_nodes_do_not_reach_each_other(error: BatonError, doubt: bool) -> None:
    assert casts_doubt(error) == doubt
