"""Errors keep their facts between processes, and mean the same in gRPC and HTTP."""

import pickle

import grpc
import pytest

from baton import errors
from baton.errors import BatonError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BatonError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickle_with_its_facts(kind):
    error = kind("what", stage="pull", node="decode-0", cause="why", retryable=True, retry_after_s=1.5, param="n")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and vars(again) == vars(error) and str(again) == "what"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_status_in_both_worlds_and_a_place_in_the_drawing(kind):
    assert kind.status in grpc.StatusCode.__members__
    assert 400 <= kind.http_status < 600
    (drawn,) = [line for line in (errors.__doc__ or "").splitlines() if line.strip(" │├└─").split(" ")[0] == kind.__name__] or [""]
    if words := drawn.split():
        described = kind.__name__ not in ("BatonError", "NodeLost", "LeaseLost")  # these three have their parent's
        assert not described or words[-2:] == [kind.status, str(kind.http_status)]
    assert drawn
