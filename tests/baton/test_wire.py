"""Whatever can be said in our types comes back from a message as it was; what baton.v1 has no field for is refused."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import wire
from baton.errors import InvalidRequest, NodeLost
from baton.request import (
    BlockCounts,
    Chunk,
    Drawn,
    FinishReason,
    GenerateRequest,
    Prompt,
    Sampling,
    SamplingAsked,
    SequenceRequest,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from baton.rpc import join
from baton.v1 import inference_pb2, node_pb2

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
COUNT = st.integers(0, 2**31)
FLOAT = st.floats(0, 1, width=32)
TEXT = st.text(max_size=5)
REASON = st.none() | st.sampled_from(list(FinishReason))
LOGPROB = st.builds(
    TokenLogprob, COUNT, st.floats(-100, 0, width=32), st.lists(st.tuples(COUNT, st.floats(-100, 0, width=32)), max_size=2).map(tuple)
)
LOGPROBS = st.lists(LOGPROB, max_size=2).map(tuple)
SEED = st.integers(0, 2**64 - 1)
LEAST, MOST = st.integers(0, 4), st.integers(5, 2**31 - 1)
SAMPLING = st.builds(
    Sampling, MOST, LEAST, FLOAT, COUNT.map(lambda k: k // 2), FLOAT, FLOAT, SEED, IDS, st.none() | st.integers(0, wire.MAX_NUM_LOGPROBS)
)
ASKED = st.builds(
    SamplingAsked,
    *(st.none() | values for values in (COUNT, COUNT, FLOAT, st.integers(-1, 2**31 - 1), FLOAT, FLOAT, st.integers(0, 2**64 - 1))),
    st.lists(TEXT, max_size=2).map(tuple),
    IDS,
    st.booleans(),
    st.none() | COUNT,
    st.booleans(),
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=2).map(tuple)
PROMPT = st.builds(lambda text: Prompt(text=text), TEXT) | st.builds(lambda ids: Prompt(token_ids=ids), IDS)
CHAT = st.builds(lambda messages, wanted: Prompt(messages=messages, add_generation_prompt=wanted), MESSAGES, st.booleans())
USAGE = st.builds(Usage, COUNT, COUNT, COUNT)


@given(
    st.builds(
        GenerateRequest,
        prompt=PROMPT | CHAT,
        sampling=ASKED,
        request_id=TEXT,
        model=TEXT,
        n=COUNT,
        stream=st.booleans(),
        echo=st.booleans(),
    )
)
def test_a_request_comes_back(request_):
    message = inference_pb2.GenerateRequest.FromString(wire.generate_request_to_message(request_).SerializeToString())
    assert wire.generate_request_from_message(message, 3.0) == replace(request_, timeout_s=3.0)


@given(
    st.builds(
        Chunk, TEXT, COUNT, TEXT, IDS, LOGPROBS, REASON, st.none() | COUNT | TEXT, st.none() | USAGE, st.none() | COUNT, st.booleans(),
        st.lists(TEXT, max_size=2).map(tuple),
    )
)  # fmt: skip
def test_a_chunk_comes_back(chunk):
    message = inference_pb2.GenerateChunk.FromString(wire.chunk_to_message(chunk).SerializeToString())
    assert wire.chunk_from_message(message) == chunk


@given(st.builds(SequenceRequest, TEXT.filter(bool), COUNT, IDS.filter(bool), SAMPLING, IDS))
def test_a_sequence_comes_back(sequence):
    message = node_pb2.SequenceRequest.FromString(wire.sequence_to_message(sequence, 2.5).SerializeToString())
    assert message.time_left_s == 2.5
    found = wire.sequence_from_message(message)
    assert found == sequence


@given(st.builds(TokenEvent, TEXT, COUNT, COUNT, IDS, LOGPROBS, REASON, st.none() | COUNT))
def test_a_token_event_comes_back(event):
    (message,) = wire.tokens_to_messages([event])
    assert wire.token_event_from_message(node_pb2.TokenEvent.FromString(message.SerializeToString())) == event


@given(st.lists(st.tuples(TEXT, COUNT, COUNT, st.integers(0, 2**31 - 1))))
def test_drawn_tokens_come_back(rows):
    drawn = Drawn()
    for row in rows:
        drawn.append(*row)
    message = node_pb2.Drawn.FromString(wire.drawn_to_message(drawn).SerializeToString())
    assert wire.drawn_from_message(message) == drawn
    assert list(drawn.rows()) == rows and len(drawn) == len(rows)
    drawn.extend(drawn)
    assert list(drawn.rows()) == rows + rows


DRAWN = {"request_ids": ["a", "b"], "attempts": [1, 2], "output_indices": [3, 4], "token_ids": [5, 6]}


@pytest.mark.parametrize(
    "wrong",
    [{name: values[:1]} for name, values in DRAWN.items()] + [{"request_ids": []}, {"token_ids": []}, {"token_ids": [5, 2**31]}],
)
def test_drawn_tokens_that_cannot_be_are_refused(wrong):
    wire.drawn_from_message(node_pb2.Drawn(**DRAWN))
    with pytest.raises(InvalidRequest):
        wire.drawn_from_message(node_pb2.Drawn(**DRAWN | wrong))


def test_counts_and_errors_come_back():
    counts = BlockCounts(10, 4, 3, 2, 1)
    assert wire.counts_from_message(wire.counts_to_message(counts)) == counts
    for error in (NodeLost("gone", stage="pull", node="d", retry_after_s=2.0), NodeLost("gone", cause="other", retryable=False)):
        assert vars(wire.error_from_message(wire.error_to_message(error), NodeLost)) == vars(error)


def test_what_cannot_be_carried_is_refused():
    named = Prompt(messages=({"role": "user", "content": "x", "name": "me"},))
    with pytest.raises(InvalidRequest, match="role and content only, not name"):
        wire.generate_request_to_message(GenerateRequest(named))
    told = Prompt(messages=(), template_values={"enable_thinking": False})
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        wire.generate_request_to_message(GenerateRequest(told))
    with pytest.raises(InvalidRequest, match="no prompt: set text"):
        wire.generate_request_from_message(inference_pb2.GenerateRequest(), None)
    with pytest.raises(InvalidRequest, match="no prompt tokens"):
        wire.sequence_from_message(node_pb2.SequenceRequest(request_id="r"))
    with pytest.raises(InvalidRequest, match="newer protocol"):
        wire.finish_from_message(77)


GOOD = {"request_id": "r", "prompt_ids": [1], "time_left_s": 2.0, "sampling": {"max_tokens": 5, "top_p": 1.0}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", "r" * 1025),
        ("prompt_ids", []),
        ("prompt_ids", [5, 2**31]),
        ("emitted_ids", [2**32 - 1]),
        ("emitted_ids", [1] * 5),
        ("time_left_s", math.nan),
        ("time_left_s", math.inf),
        ("time_left_s", -1.0),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("min_tokens", 6),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.5),
        ("top_k", 2**31),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -math.inf),
        ("num_logprobs", 65),
        ("stop_token_ids", [7] * 4097),
    ],
)
def test_a_sequence_that_cannot_be_is_refused_by_name(field, value):
    sampling = {"sampling": GOOD["sampling"] | {field: value}}
    fields = GOOD | ({field: value} if field in node_pb2.SequenceRequest.DESCRIPTOR.fields_by_name else sampling)
    wire.sequence_from_message(node_pb2.SequenceRequest(**GOOD))
    with pytest.raises(InvalidRequest) as caught:
        wire.sequence_from_message(node_pb2.SequenceRequest(**fields))
    assert field in caught.value.message or caught.value.cause == "empty_prompt"


@pytest.mark.parametrize(("logprob", "top"), [(math.nan, 0.0), (math.inf, 0.0), (-1.0, math.nan)])
def test_an_event_with_impossible_numbers_is_refused(logprob, top):
    said = inference_pb2.TokenLogprob(token_id=3, logprob=logprob, top=[inference_pb2.TopLogprob(token_id=4, logprob=top)])
    with pytest.raises(InvalidRequest, match="token 3"):
        wire.token_event_from_message(node_pb2.TokenEvent(token_ids=[3], logprobs=[said]))
    with pytest.raises(InvalidRequest, match=str(2**31)):
        wire.token_event_from_message(node_pb2.TokenEvent(token_ids=[2**31]))


def test_an_error_of_a_peer_is_cut_to_what_can_be_shown():
    said = inference_pb2.ErrorDetail(message="m" * 10_000, node="n" * 999, cause="a b\n", retry_after_s=math.nan)
    error = wire.error_from_message(said, NodeLost)
    assert (len(error.message), len(error.node), error.cause, error.retry_after_s) == (4096, 256, "node_lost", None)
    for later_s, kept in ((-1.0, None), (math.inf, None), (1e9, None), (0.0, 0.0), (3600.0, 3600.0)):
        assert wire.error_from_message(inference_pb2.ErrorDetail(retry_after_s=later_s), NodeLost).retry_after_s == kept


def test_addresses_as_urls_write_them():
    assert (join("127.0.0.1", 8001), join("::1", 8001), join("localhost", 0)) == ("127.0.0.1:8001", "[::1]:8001", "localhost:0")
