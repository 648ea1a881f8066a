"""What crosses the keeper's pipe arrives as it was sent, errors with their class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, ConfigError, InternalError, NodeLost, ResourceExhausted
from cluster.messages import EVENT, Back, Facts, Failed, Lost, News, Progress, RankInfo, Rebuilding, Reply, Retired, Waiting

errors = st.builds(
    lambda kind, message, stage, node, retryable: kind(message, stage=stage, node=node, retryable=retryable),
    st.sampled_from([ConfigError, InternalError, NodeLost, ResourceExhausted]),
    *[st.text()] * 3,
    st.booleans(),
)


@given(errors, st.text())
def test_errors_keep_class_and_facts(error: BatonError, log: str) -> None:
    event = EVENT.validate_json(Failed(error=Facts.of(error), log=log).model_dump_json())
    assert isinstance(event, Failed)
    again = event.error.error()
    assert type(again) is type(error)
    assert (again.message, again.stage, again.node, again.cause, again.retryable, event.log) == (
        error.message,
        error.stage,
        error.node,
        error.cause,
        error.retryable,
        log,
    )


def test_an_unknown_error_is_an_internal_one() -> None:
    assert type(Facts(kind="SomethingNew", message="m").error()) is InternalError


def test_events_are_told_apart() -> None:
    progress = Progress(node="decode-0", rank=1, stage="loading weights", done_bytes=3, total_bytes=7)
    assert EVENT.validate_json(progress.model_dump_json()) == progress
    reply = Reply(number=4, answer=[{"node": "prefill-0"}])
    assert EVENT.validate_json(reply.model_dump_json()) == reply


@pytest.mark.parametrize(
    ("news", "said"),
    [
        (Lost(name="decode-0/1", pid=7, reason="its process died"), "lost: decode-0/1 (pid 7) ended: its process died"),
        (Lost(name="decode-0/1", pid=7, reason="silent for 6 s", ended=False), "lost: decode-0/1 (pid 7) hangs: silent for 6 s"),
        (Rebuilding(node="decode-0", why="decode-0/1 died"), "rebuilding decode-0 (decode-0/1 died) ..."),
        (Waiting(node="decode-0", why="x", seconds=4.0), "waiting: decode-0 cannot be built now, the next try is in 4 s: x"),
        (Waiting(node="decode-0", why="no host"), "waiting: decode-0 cannot be built now, goes on once it can: no host"),
        (Back(node="router", seconds=9.312), "back: router after 9.3 s"),
        (Retired(node="decode-0", num_processes=2), "retired: decode-0, 2 processes ended"),
    ],
)
def test_news_cross_the_pipe_and_are_said_in_one_line(news: News, said: str) -> None:
    assert EVENT.validate_json(news.model_dump_json()) == news
    assert news.said() == said


@pytest.mark.parametrize("line", ["{}", '{"event": "ready"}', "no json"])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError):
        EVENT.validate_json(line)


def test_ranks_are_named_as_people_say() -> None:
    assert RankInfo(role="decode", node="decode-0", rank=1, pid=1, host="h", address="h:1").name == "decode-0/1"
