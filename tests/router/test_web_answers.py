"""What the answer formats share: JSON in parts is JSON, and an error says to OpenAI's clients whether to come again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, InternalError, InvalidRequest, NodeLost, ResourceExhausted, Unavailable
from router.web_answers import error_response, parts, to_json

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
NESTED = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=12
)


@given(st.dictionaries(st.text(max_size=4), NESTED, max_size=3), st.integers(0, 6))
def test_parts_are_together_what_the_whole_is(content: dict[str, object], depth: int) -> None:
    assert b"".join(parts(content, depth)) == to_json(content)


def test_no_part_holds_more_than_what_lies_deeper() -> None:
    content = {"choices": [{"logprobs": {"content": [{"token": str(number)} for number in range(1000)]}}]}
    assert max(map(len, parts(content, 5))) < 20
    assert json.loads(b"".join(parts(content, 5))) == content


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (NodeLost("6 nodes in a row were lost", retryable=False), False),
        (InternalError("a bug"), False),
        (InvalidRequest("no such thing"), False),
        (Unavailable("no pair of nodes"), True),
        (ResourceExhausted("full"), True),
    ],
)
def test_whoever_should_not_come_again_is_told_so(error: BatonError, again: bool) -> None:
    assert error_response(error).headers.get("x-should-retry") == (None if again else "false")
