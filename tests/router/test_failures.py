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
from router.failures import casts_doubt, final, is_bug, is_loss, lease_gone, says_full, worth_another

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


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (NodeLost("the stream broke", stage="router"), True),
        (NodeLost("the node is shutting down", stage="decode"), True),
        (Unavailable("a step has taken 30 s", cause="step_stalled"), True),
        (Unavailable("rank 1 is silent", cause="rank_silent"), True),
        (NodeLost("no answer", stage="pull", cause="handshake"), False),
        (NodeLost("prefill-0 has closed the Pull", stage="pull"), False),
        (LeaseLost("revoked", stage="pull"), False),
        (Unavailable("taken out of use", stage="router", cause="handed_over"), False),
        (InternalError("step failed", stage="decode"), False),
    ],
)
def test_a_loss_is_a_node_that_ended_not_one_that_another_cannot_reach(error: BatonError, loss: bool) -> None:
    assert is_loss(error) == loss


def test_what_the_client_is_told_in_the_end_is_not_its_own_fault_and_no_invitation() -> None:
    lost = final(NodeLost("the stream broke", stage="router", node="decode-0"))
    assert isinstance(lost, NodeLost)
    assert (lost.cause, lost.node, lost.retryable, lost.http_status) == ("node_losses", "decode-0", False, 503)
    strange = final(InvalidRequest("block 9 is outside", stage="pull", node="decode-0"))
    assert isinstance(strange, InternalError)
    assert (strange.stage, strange.node, strange.http_status) == ("pull", "decode-0", 500)
    assert "block 9" in strange.message
    for error in (InternalError("step failed", stage="decode"), InvalidRequest("too long", stage="prefill")):
        assert final(error) is error
