"""What HTTP bodies mean, which fields are refused by name and which are neutral, and that bad input of any kind is one clear error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.request import GenerateRequest, Prompt, SamplingAsked
from router.schema import ChatBody, CompletionBody, Limits, parse, read_json
from router.schema_native import NativeBody

LIMITS = Limits(max_prompts=3, max_answers=5)
MESSAGES = [{"role": "user", "content": "hi"}]
MINIMAL = {CompletionBody: {"prompt": "x"}, ChatBody: {"messages": MESSAGES}, NativeBody: {"text": "x"}}


def requests(kind, **content) -> tuple[GenerateRequest, ...]:
    return parse(kind, json.dumps(content).encode()).requests("id", 7.0, LIMITS)


def refusal(kind, **content) -> str:
    with pytest.raises(InvalidRequest) as refused:
        requests(kind, **content)
    return refused.value.message


def test_a_completion_says_all_of_it():
    (request,) = requests(
        CompletionBody,
        model="m",
        prompt="x",
        n=2,
        stream=True,
        echo=True,
        max_tokens=5,
        min_tokens=1,
        temperature=0,
        top_k=-1,
        top_p=0.5,
        min_p=0.1,
        seed=3,
        stop="a",
        stop_token_ids=[4],
        ignore_eos=True,
        skip_special_tokens=False,
    )
    asked = SamplingAsked(5, 1, 0.0, -1, 0.5, 0.1, 3, ("a",), (4,), True, None, False)
    assert request == GenerateRequest(Prompt(text="x"), asked, "id", "m", 2, True, True, 16, 7.0)


def test_defaults_of_the_three():
    (completion,) = requests(CompletionBody, prompt="x", stop="", logprobs=None)
    assert completion == GenerateRequest(Prompt(text="x"), SamplingAsked(), "id", stream=False, default_max_tokens=16, timeout_s=7.0)
    (chat,) = requests(ChatBody, messages=MESSAGES)
    assert (chat.prompt, chat.default_max_tokens, chat.stream) == (Prompt(messages=({"role": "user", "content": "hi"},)), None, False)
    (native,) = requests(NativeBody, text="x")
    assert (native.prompt, native.default_max_tokens, native.sampling) == (Prompt(text="x"), 128, SamplingAsked())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ([1, 2], [Prompt(token_ids=(1, 2))]),
        (["a", ""], [Prompt(text="a"), Prompt(text="")]),
        ([[1], [2, 3]], [Prompt(token_ids=(1,)), Prompt(token_ids=(2, 3))]),
        ([[5]], [Prompt(token_ids=(5,))]),
    ],
)
def test_prompts_may_be_text_or_ids_one_or_many(prompt, prompts):
    found = requests(CompletionBody, prompt=prompt)
    assert [request.prompt for request in found] == prompts
    assert [request.request_id for request in found] == (["id"] if len(prompts) == 1 else ["id.0", "id.1"])


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], 2], [True], 5, {"a": 1}, [[1.5]], [["a"]]])
def test_other_prompts_are_refused(prompt):
    assert "prompt: must be text" in refusal(CompletionBody, prompt=prompt)


def test_token_ids_have_a_range():
    assert "0 … 2147483647 (given: -1 … 4)" in refusal(CompletionBody, prompt=[4, -1])
    assert "given: 0 … 2147483648" in refusal(CompletionBody, prompt=[[0, 2**31]])


def test_chat_fields():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answered = {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "annotations": [], "audio": None, "name": "n"}
    (request,) = requests(
        ChatBody,
        messages=[{"role": "user", "content": content}, answered, {"role": "assistant"}],
        max_tokens=3,
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
        add_generation_prompt=False,
    )
    expected = (
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "name": "n"},
        {"role": "assistant", "content": ""},
    )
    assert request.prompt == Prompt(messages=expected, add_generation_prompt=False)
    assert (request.sampling.max_tokens, request.sampling.logprobs) == (4, 2)
    assert requests(ChatBody, messages=MESSAGES, logprobs=True)[0].sampling.logprobs == 0
    assert requests(ChatBody, messages=MESSAGES, logprobs=False)[0].sampling.logprobs is None


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must hold at least one message"),
        ("hi", "messages: Input should be a valid tuple"),
        ([{"role": "user"}], "messages.0: content is required"),
        ([{"role": "tool", "content": "x"}], "messages.0.role: Input should be 'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}], 'messages.0.content: .*"image_url" is not supported'),
        ([{"role": "user", "content": ["x"]}], "messages.0.content: content parts must be"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{"id": 1}]}], "messages.1: tool_calls is not supported"),
        ([{"role": "user", "content": "x", "contnet": "y"}], "messages.0: contnet is not a known field; did you mean content?"),
    ],
)
def test_messages_that_are_refused(messages, message):
    assert pytest.RaisesExc(InvalidRequest, match=message).matches(error_of(ChatBody, messages=messages))


def error_of(kind, **content) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        requests(kind, **content)
    return refused.value


def test_native_fields():
    params = {"max_new_tokens": 9, "min_new_tokens": 1, "temperature": 0.5, "sampling_seed": 4, "stop": ["a", "b"], "n": 2}
    first, second = requests(NativeBody, input_ids=[[1], [2]], sampling_params=params, return_logprob=True, top_logprobs_num=3, stream=True)
    assert (first.prompt, second.prompt, first.n, first.stream) == (Prompt(token_ids=(1,)), Prompt(token_ids=(2,)), 2, True)
    assert first.sampling == SamplingAsked(9, 1, 0.5, seed=4, stop=("a", "b"), logprobs=3) == second.sampling
    several = requests(NativeBody, text=["a", "b"], sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}])
    assert [request.sampling.max_tokens for request in several] == [1, 2]
    assert requests(NativeBody, text=["a", "b"], rid="mine")[1].request_id == "mine.1"
    assert "either text or input_ids" in refusal(NativeBody)
    assert "either text or input_ids" in refusal(NativeBody, text="x", input_ids=[1])
    assert "token ids go in input_ids" in refusal(NativeBody, text=[1, 2])
    assert "2 entries for 3 prompts" in refusal(NativeBody, text=["a", "b", "c"], sampling_params=[{}, {}])
    assert "sampling_params.0.temperature" in refusal(NativeBody, text="x", sampling_params={"temperature": -1})
    assert "sampling_params.0: regex is not supported" in refusal(NativeBody, text="x", sampling_params={"regex": "a+"})


@pytest.mark.parametrize("kind", MINIMAL)
def test_unsupported_fields_are_refused_by_name_unless_neutral(kind):
    for name, neutral in kind.unsupported.items():
        for value in (None, *neutral):
            assert requests(kind, **MINIMAL[kind], **{name: value})
        assert refusal(kind, **MINIMAL[kind], **{name: "something"}).startswith(f"{name} is not supported")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.1),
        ("repetition_penalty", 0),
        ("logit_bias", {"50256": -100}),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("structured_outputs", {"regex": "a"}),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
    ],
)
def test_what_asks_for_something_is_refused(field, value):
    for kind in (CompletionBody, ChatBody):
        assert f"{field} is not supported (given: " in refusal(kind, **MINIMAL[kind], **{field: value})


def test_what_chat_alone_knows_is_refused_there():
    for field in ("tools", "functions"):
        assert f"{field} is not supported" in refusal(ChatBody, messages=MESSAGES, **{field: [{"type": "function"}]})
    assert "tool_choice is not supported" in refusal(ChatBody, messages=MESSAGES, tool_choice="required")
    assert "modalities is not supported" in refusal(ChatBody, messages=MESSAGES, modalities=["text", "audio"])
    assert "suffix is not supported" in refusal(CompletionBody, prompt="x", suffix="y")
    assert requests(ChatBody, messages=MESSAGES, tools=[], tool_choice="auto", parallel_tool_calls=True, modalities=["text"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"n": 0}, "n: .*greater than or equal to 1 .given: 0."),
        ({"n": 2**31}, "n: .*less than"),
        ({"prompt": ["a", "b"], "n": 3}, "at most 5 answers to its prompts together .given: 6."),
        ({"x" * 5000: 1}, "x{120} is not a known field$"),
        ({"stop": ["a"] * 16385}, "stop: must have at most 16384 items .given: 16385."),
        ({"stop_token_ids": [-1] * 100}, "stop_token_ids.7: .*; and 92 more$"),
        ({"prompt": ["a"] * 4}, "at most 3 prompts .given: 4."),
        ({"temperature": -0.1}, "temperature: .*greater than or equal to 0 .given: -0.1."),
        ({"temperature": "hot"}, "temperature: .*valid number"),
        ({"top_p": 0}, "top_p: .*greater than 0"),
        ({"top_p": 1.1}, "top_p: .*less than or equal to 1"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1 .given: 0.; a prompt is not given back alone"),
        ({"max_tokens": 0, "echo": True}, "max_tokens: must be at least 1"),
        ({"max_tokens": -1}, "max_tokens: .*greater than or equal to 1"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed: .*less than 9223372036854775808"),
        ({"stop": ["a", ""]}, "stop.1: .*at least 1 character"),
        ({"stop": [1]}, "stop.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"logprobs": 21}, "logprobs: .*less than or equal to 20"),
        ({"echo": True, "logprobs": 0}, "echo with logprobs"),
        ({"best_of": 2}, "best_of is not supported unless it equals n .given: best_of 2, n 1."),
        ({"top_logprobs": 2}, "top_logprobs is not a known field"),
        ({"temprature": 1}, "temprature is not a known field; did you mean temperature?"),
        ({"stream_options": {"include_usge": True}}, "stream_options: include_usge is not a known field"),
    ],
)
def test_bad_values_are_named_with_their_numbers(content, message):
    assert pytest.RaisesExc(InvalidRequest, match=message).matches(error_of(CompletionBody, **{"prompt": "x"} | content))


@pytest.mark.parametrize(
    ("kind", "content", "param"),
    [
        (CompletionBody, {"temperature": -1}, "temperature"),
        (CompletionBody, {"n": 0}, "n"),
        (CompletionBody, {"prompt": ["a", "b"], "n": 3}, "n"),
        (CompletionBody, {"logit_bias": {"1": 1}}, "logit_bias"),
        (CompletionBody, {"temprature": 1}, "temprature"),
        (CompletionBody, {"best_of": 2}, "best_of"),
        (CompletionBody, {"prompt": None}, "prompt"),
        (CompletionBody, {"stream_options": {"x": 1}}, "stream_options.x"),
        (ChatBody, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (ChatBody, {"messages": []}, "messages"),
        (NativeBody, {"sampling_params": {"regex": "a"}}, "sampling_params.0.regex"),
        (NativeBody, {"text": None}, ""),
    ],
)
def test_an_error_says_which_field(kind, content, param):
    assert error_of(kind, **MINIMAL[kind] | content).param == param


def test_what_the_template_is_told():
    (request,) = requests(ChatBody, messages=MESSAGES, chat_template_kwargs={"enable_thinking": False, "other": [1]})
    assert request.prompt.template_values == {"enable_thinking": False, "other": [1]}
    assert requests(ChatBody, messages=MESSAGES, chat_template_kwargs={})[0].prompt.template_values == {}
    assert "chat_template_kwargs: Input should be a valid dictionary" in refusal(ChatBody, messages=MESSAGES, chat_template_kwargs=[1])


def test_what_goes_together():
    assert requests(CompletionBody, prompt="x", best_of=2, n=2)
    assert "top_logprobs needs logprobs" in refusal(ChatBody, messages=MESSAGES, top_logprobs=1)


def test_harmless_fields_are_ignored():
    harmless = {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "stream_options": {"include_usage": True}}
    for kind in (CompletionBody, ChatBody):
        assert requests(kind, **MINIMAL[kind], **harmless)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff", "not UTF-8: byte 0 is 0xff"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b'{"a": "\\udfff"}', "surrogate"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "at most 64 objects and arrays"),
        (b'{"a": [' + b"[1]," * 70 + b"[" * 63 + b"]" * 63 + b"]}", "at most 64 objects and arrays"),
        (b'{"a": 1, "b": {"c": 2, "c": 2}}', "has the key 'c' more than once"),
        (b'{"a": [1e999]}', "1e999 is too large a number"),
        (b'{"a": -1e999}', "-1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_json_of_text_and_numbers(body, message):
    with pytest.raises(InvalidRequest, match=message):
        read_json(body)


def test_a_surrogate_pair_is_text():
    assert read_json(b'{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}
    nested: object = 1
    for _ in range(63):
        nested = {"a": nested}
    assert read_json(json.dumps({"wide": [[]] * 100, "deep": nested}).encode())["deep"] == nested


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_body_is_accepted_or_refused(data):
    kind = data.draw(st.sampled_from(list(MINIMAL)))
    names = st.sampled_from([*kind.model_fields, *kind.unsupported])
    content = MINIMAL[kind] | data.draw(st.dictionaries(names | st.text(max_size=5), JSON, max_size=4))
    try:
        found = parse(kind, json.dumps(content).encode()).requests("id", None, LIMITS)
    except InvalidRequest as refused:
        assert refused.message
    else:
        assert all(isinstance(request, GenerateRequest) and 1 <= request.n < 2**31 for request in found)
