"""Admission counts right, refuses with the field and the numbers, and resolves what the client did not say."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.errors import InvalidRequest, ResourceExhausted
from baton.request import GenerateRequest, Prompt, Sampling, SamplingAsked
from router.admission import Admission, Limits, Verdict, check_prompt, check_request, check_sampling, resolve, sequence_seed

LIMITS = Limits(max_model_len=100, vocab_size=50)


def test_the_queue_is_bounded_and_in_order():
    door = Admission(max_running=1, max_queue=2, retry_after_s=2.5)
    assert [door.enter(name) for name in "abc"] == [Verdict.ADMIT, Verdict.QUEUE, Verdict.QUEUE]
    with pytest.raises(ResourceExhausted, match=r"1 requests run \(at most 1\) and 2 wait \(at most 2\)") as full:
        door.enter("d")
    assert full.value.retry_after_s == 2.5
    assert full.value.stage == "admission"
    assert door.leave("b") is None, "it gave up waiting"
    assert (door.num_running, door.num_queued) == (1, 1)
    assert door.leave("a") == "c"
    assert door.leave("c") is None
    assert (door.num_running, door.num_queued) == (0, 0)


class DoorMachine(RuleBasedStateMachine):
    """Requests come and go; the queue is served in order and nobody waits while there is room."""

    @initialize(max_running=st.integers(1, 3), max_queue=st.integers(0, 3))
    def make(self, max_running, max_queue):
        self.door = Admission(max_running, max_queue)
        self.limits = (max_running, max_queue)
        self.running, self.queue, self.count = set(), [], 0

    @rule()
    def enter(self):
        self.count += 1
        name = f"r{self.count}"
        if len(self.running) < self.limits[0]:
            assert self.door.enter(name) is Verdict.ADMIT
            self.running.add(name)
        elif len(self.queue) < self.limits[1]:
            assert self.door.enter(name) is Verdict.QUEUE
            self.queue.append(name)
        else:
            with pytest.raises(ResourceExhausted):
                self.door.enter(name)

    @rule(which=st.integers(0, 9))
    def leave(self, which):
        names = [*sorted(self.running), *self.queue, "stranger"]
        name = names[which % len(names)]
        admitted = self.door.leave(name)
        was_running = name in self.running
        self.running.discard(name)
        self.queue = [other for other in self.queue if other != name]
        assert admitted == (self.queue[0] if was_running and self.queue else None)
        if admitted:
            self.running.add(self.queue.pop(0))

    @invariant()
    def counts(self):
        assert (self.door.num_running, self.door.num_queued) == (len(self.running), len(self.queue))
        assert not self.queue or len(self.running) == self.limits[0]


TestDoor = DoorMachine.TestCase
TestDoor.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": -(10**400)}, "max_tokens must be at least 1"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, not -1"),
        ({"temperature": -0.1}, r"temperature must be 0 to 100.0, not -0.1"),
        ({"temperature": 101.0}, r"temperature must be 0 to 100.0, not 101.0"),
        ({"temperature": math.nan}, "temperature must be a finite number, not nan"),
        ({"temperature": math.inf}, "temperature must be a finite number, not inf"),
        ({"top_k": -2}, "top_k must be -1 to 2147483647, not -2"),
        ({"top_p": 0.0}, "top_p must be more than 0"),
        ({"top_p": 1.1}, "top_p must be 0 to 1, not 1.1"),
        ({"min_p": -0.5}, "min_p must be 0 to 1, not -0.5"),
        ({"seed": 2**64}, "seed must be -9223372036854775808 to 18446744073709551615"),
        ({"logprobs": 21}, "logprobs must be 0 to 20, not 21"),
        ({"stop": ("a",) * 17}, "stop has 17 strings, at most 16"),
        ({"stop": ("",)}, "stop has a string of 0 characters"),
        ({"stop": ("a" * 1025,)}, "stop has a string of 1025 characters, 1 to 1024"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids has 65 ids, at most 64"),
        ({"stop_token_ids": (1, 50)}, "stop_token_ids holds 50, token ids are 0 to 49"),
    ],
)
def test_bad_sampling_is_refused_by_name(asked, message):
    with pytest.raises(InvalidRequest, match=message):
        check_sampling(SamplingAsked(**asked), LIMITS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 0}, "n must be 1 to 128, not 0"),
        ({"n": 129}, "n must be 1 to 128, not 129"),
        ({"timeout_s": 0.0}, "timeout_s must be more than 0 and at most 3600, not 0"),
        ({"timeout_s": 3601.0}, "timeout_s must be more than 0"),
        ({"timeout_s": math.nan}, "timeout_s must be a finite number"),
        ({"sampling": SamplingAsked(top_k=-7)}, "top_k"),
    ],
)
def test_bad_requests_are_refused_by_name(asked, message):
    with pytest.raises(InvalidRequest, match=message):
        check_request(GenerateRequest(Prompt(text="x"), **asked), LIMITS)


def test_good_requests_pass():
    sampling = SamplingAsked(8, 2, 0.0, -1, 1.0, 0.0, -(2**63), ("stop",), (0, 49), logprobs=20)
    check_request(GenerateRequest(Prompt(text="x"), sampling, n=128, timeout_s=3600.0), LIMITS)
    check_request(GenerateRequest(Prompt(text="x")), LIMITS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "at least 1 token"),
        ((1,) * 100, "prompt has 100 tokens; .* more than the 100"),
        ((1, -1), "prompt holds -1, token ids are 0 to 49"),
        ((50,), "prompt holds 50"),
    ],
)
def test_bad_prompts_are_refused_with_the_numbers(prompt, message):
    with pytest.raises(InvalidRequest, match=message):
        check_prompt(prompt, LIMITS)


def resolved(asked=None, defaults=None, eos_ids=(2,), prompt_len=10, default_max_tokens=16):
    return resolve(
        asked or SamplingAsked(),
        defaults or SamplingAsked(),
        eos_ids,
        prompt_len=prompt_len,
        max_model_len=100,
        default_max_tokens=default_max_tokens,
        drawn_seed=77,
    )


def test_a_good_prompt_passes():
    check_prompt((0, 49), LIMITS)


def test_the_clients_word_goes_before_the_models_and_that_before_ours():
    defaults = SamplingAsked(temperature=0.6, top_k=20, top_p=0.9)
    assert resolved(SamplingAsked(temperature=0.0, top_k=-1, min_p=0.1, seed=-1, logprobs=2), defaults) == Sampling(
        max_tokens=16, temperature=0.0, top_k=0, top_p=0.9, min_p=0.1, seed=2**64 - 1, stop_token_ids=(2,), num_logprobs=2
    )
    assert resolved() == Sampling(max_tokens=16, temperature=1.0, seed=77, stop_token_ids=(2,))


@pytest.mark.parametrize(("prompt_len", "default", "expected"), [(10, 16, 16), (90, 16, 10), (10, None, 90), (99, None, 1)])
def test_a_default_answer_fits_in_the_context(prompt_len, default, expected):
    assert resolved(prompt_len=prompt_len, default_max_tokens=default).max_tokens == expected


def test_an_explicit_answer_must_fit():
    assert resolved(SamplingAsked(max_tokens=90)).max_tokens == 90
    with pytest.raises(InvalidRequest, match="max_tokens 91 and 10 prompt tokens make 101, at most 100 fit; ask for at most 90"):
        resolved(SamplingAsked(max_tokens=91))
    with pytest.raises(InvalidRequest, match="min_tokens 17 is more than max_tokens 16"):
        resolved(SamplingAsked(min_tokens=17))


def test_stop_ids_hold_the_ends_unless_ignored():
    asked = SamplingAsked(stop_token_ids=(7, 2, 7))
    assert resolved(asked, eos_ids=(2, 3)).stop_token_ids == (2, 3, 7)
    assert resolved(SamplingAsked(stop_token_ids=(7,), ignore_eos=True)).stop_token_ids == (7,)


def test_seeds_of_several_sequences():
    assert [sequence_seed(2**64 - 1, i) for i in range(3)] == [2**64 - 1, 0, 1]


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (GenerateRequest(Prompt(text="x"), request_id="r" * 257), "request_id", "may have 256 printable characters, not 257"),
        (GenerateRequest(Prompt(text="x"), request_id="a\nb"), "request_id", "printable"),
        (GenerateRequest(Prompt(text="x"), model="m" * 10_000), "model", "not 10000: 'mmm"),
        (GenerateRequest(Prompt(messages=({"role": "user", "content": ""},) * 4097)), "messages", "4097 messages, at most 4096"),
        (GenerateRequest(Prompt(messages=({"role": "tool", "content": ""},))), "messages.0.role", "not 'tool'"),
        (GenerateRequest(Prompt(messages=({"content": ""},))), "messages.0.role", "assistant, developer, system, user"),
    ],
)
def test_names_and_messages_are_bounded(request_, param, message):
    with pytest.raises(InvalidRequest) as caught:
        check_request(request_, LIMITS)
    assert caught.value.param == param and message in caught.value.message and len(caught.value.message) < 200
    check_request(GenerateRequest(Prompt(messages=({"role": "user", "content": ""},) * 4096), request_id="ü" * 256), LIMITS)
