"""The decode scheduler against a memory that remembers what was written where: right content, one writer, nothing lost, and always on."""

import dataclasses
import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.engine.batch import Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.errors import InvalidRequest, ResourceExhausted
from baton.request import FinishReason, Sampling, SequenceRequest, TokenEvent, TokenLogprob
from decode_node.outcome import Admitted, DecodeLoad
from decode_node.scheduler import DecodeScheduler
from decode_node.stages import Stage
from tests.decode_node.plain_scheduler import PlainScheduler

SIZE = 4
STOP = 9


def ask(request_id, prompt, attempt=1, emitted=(), **sampling):
    return SequenceRequest(request_id, attempt, tuple(prompt), Sampling(**{"max_tokens": 8, **sampling}), tuple(emitted))


def model(context):
    """A token that depends on every token before it."""
    value = 0
    for token in context:
        value = (7 * value + token + 1) % 9973
    return value % 10


def stream(request):
    """The whole answer as an undisturbed run gives it."""
    tokens = [*request.prompt_ids]
    while True:
        tokens.append(model(tokens))
        if request.sampling.finish(len(tokens) - len(request.prompt_ids), tokens[-1]):
            return tokens[len(request.prompt_ids) :]


def stream_after(request):
    """The whole answer of a request some of whose tokens were emitted before, whatever they are."""
    tokens = [*request.prompt_ids, *request.emitted_ids]
    while not request.sampling.finish(len(tokens) - len(request.prompt_ids), tokens[-1]):
        tokens.append(model(tokens))
    return tokens[len(request.prompt_ids) :]


class Group:
    """What surrounds the scheduler: block memory as tokens, and pulls that write into it."""

    def __init__(self, num_blocks=16, scheduler=DecodeScheduler, **limits):
        self.pool = BlockPool(num_blocks, SIZE)
        limits = {
            "max_sequences": 4,
            "max_waiting": 20,
            "reserve_output_tokens": 4,
            "max_step_tokens": 6,
            "mixed_step_tokens": 99,
            "max_model_len": 64,
            **limits,
        }
        self.scheduler = scheduler(self.pool, **limits)
        self.memory = {}
        self.requests = {}
        self.tables = {}  # of sequences that are pulling: matched and bound blocks are not told, only bound ones
        self.batch = None

    def add(self, request, alone=False):
        self.scheduler.add(request, alone=alone)
        self.requests[request.key] = request

    def pull(self, admitted, count=None):
        """Bind and write the next `count` blocks of a prompt, all by default; whether the prompt is complete."""
        request = admitted.request
        key, tokens = request.key, [*request.prompt_ids, *request.emitted_ids]
        done = admitted.matched_blocks + len(self.tables.setdefault(key, []))
        whole = admitted.num_blocks
        assert whole == blocks_for(len(tokens), SIZE)
        bound = self.scheduler.bind(key, min(count or whole, whole - done))
        for i, (block, generation) in enumerate(bound, done):
            assert self.pool.generation(block) == generation
            for slot, token in enumerate(tokens[i * SIZE : (i + 1) * SIZE]):
                self.memory[block, slot] = token
        self.tables[key] += bound
        return done + len(bound) == whole

    def start(self, key, **more):
        request = self.requests[key]
        tokens = [*request.prompt_ids, *request.emitted_ids]
        count, token = len(request.emitted_ids), model(tokens)
        reason = request.sampling.finish(count + 1, token)
        self.tables.pop(key, None)
        return self.scheduler.start(key, TokenEvent(*key, count, (token,), finish_reason=reason, **more))

    def begin(self, request):
        """Add, admit, pull and start one sequence."""
        self.add(request)
        (admitted,) = self.scheduler.admit()
        assert self.pull(admitted)
        return self.start(request.key)

    def plan(self, blocked=frozenset()):
        batch = self.batch = self.scheduler.plan(blocked)
        assert [self.pool.generation(block) for block in batch.new_blocks.tolist()] == batch.new_generations.tolist()
        seen = {block for pairs in self.tables.values() for block, _ in pairs}
        for s in range(batch.num_sequences):
            rows = range(batch.query_starts[s], batch.query_starts[s + 1])
            assert batch.context_lens[s] == batch.positions[rows[-1]] + 1
            written = set()
            for row in rows:
                position = int(batch.positions[row])
                block = int(batch.block_tables[s, position // SIZE])
                assert block not in seen, "two sequences write one block"
                written.add(block)
                self.memory[block, position % SIZE] = int(batch.token_ids[row])
            seen |= written
        return batch

    def drawn(self):
        batch = self.batch
        ends = [int(end) - 1 for end in batch.query_starts[1:]]
        sampled = [ends.index(row) for row in batch.sample_rows.tolist()]
        contexts = [(batch.block_tables[s].tolist(), int(batch.context_lens[s])) for s in sampled]
        tokens = [model([self.memory[table[i // SIZE], i % SIZE] for i in range(end)]) for table, end in contexts]
        columns = max(0, *batch.num_logprobs.tolist(), 0)
        count = len(tokens)
        return Sampled(
            np.array(tokens, np.int64),
            np.full(count, -0.5, np.float32),
            np.tile(np.arange(columns), (count, 1)),
            np.full((count, columns), -1.5, np.float32),
        )

    def step(self, blocked=frozenset()):
        self.plan(blocked)
        return self.apply()

    def apply(self):
        """What the planned step brought, as one event per sequence, oldest first; columns hold what needs no event."""
        applied = self.scheduler.apply(self.drawn())
        for event in applied.events:
            assert event.finish_reason or event.logprobs or event.cached_tokens is not None
        return self.merged(applied)

    def merged(self, applied):
        plain = [TokenEvent(name, attempt, index, (token,)) for name, attempt, index, token in applied.drawn.rows()]
        return tuple(sorted([*plain, *applied.events], key=lambda event: list(self.requests).index((event.request_id, event.attempt))))

    def run(self, steps=80):
        return [event for _ in range(steps) for event in self.step()]


def tokens_of(events, key):
    return [token for event in events if (event.request_id, event.attempt) == key for token in event.token_ids]


def test_from_the_pull_to_the_last_token():
    group = Group()
    request = ask("a", range(10, 20), max_tokens=7)
    group.add(request)
    assert group.scheduler.load() == DecodeLoad(waiting=1, pulling=0, computing=0, running=0, waiting_tokens=10)
    (admitted,) = group.scheduler.admit()
    assert admitted == Admitted(request, matched_blocks=0, num_blocks=3)
    assert group.pool.counts().held == 0, "room is promised by count"
    assert group.pool.available() == 16 - 4
    assert not group.pull(admitted, 2)
    assert group.scheduler.load() == DecodeLoad(waiting=0, pulling=1, computing=0, running=0, waiting_tokens=0)
    assert group.pull(admitted)
    first = group.start(("a", 1))
    assert (first.request_id, first.attempt, first.output_index) == ("a", 1, 0)
    events = [first, *group.run()]
    assert tokens_of(events, ("a", 1)) == stream(request)
    assert [event.output_index for event in events] == list(range(7))
    assert [event.finish_reason for event in events] == [None] * 6 + [FinishReason.LENGTH]
    assert group.scheduler.idle()
    assert group.pool.counts().cached == 4, "generated blocks are cached too: 16 tokens have their KV here"


def test_a_prefix_that_is_here_is_not_pulled():
    group = Group()
    group.begin(ask("a", range(10, 22)))
    request = ask("b", range(10, 22))
    group.add(request)
    (admitted,) = group.scheduler.admit()
    assert admitted == Admitted(request, 2, 3), "the block of the last token is always its own"
    assert group.pull(admitted)
    assert len(group.tables["b", 1]) == 1


def test_the_next_attempt_finds_what_the_last_one_generated():
    group = Group()
    request = ask("a", range(6), max_tokens=12)
    events = [group.begin(request), *group.run(5)]
    group.scheduler.cancel(("a", 1), quarantine=False)
    emitted = tokens_of(events, ("a", 1))
    group.add(ask("a", range(6), attempt=2, emitted=emitted, max_tokens=12))
    (admitted,) = group.scheduler.admit()
    assert admitted.matched_blocks == 2
    assert group.pull(admitted)
    events += [group.start(("a", 2)), *group.run()]
    assert emitted + tokens_of(events, ("a", 2)) == stream(request)


def test_logprobs_travel_with_their_tokens():
    group = Group()
    group.add(ask("a", [1, 2], num_logprobs=2))
    group.add(ask("b", [3, 2], num_logprobs=0))
    group.add(ask("c", [4, 2]))
    for admitted in group.scheduler.admit():
        assert group.pull(admitted)
        group.start(admitted.request.key)
    a, b, c = group.step()
    assert a.logprobs == (TokenLogprob(a.token_ids[0], -0.5, ((0, -1.5), (1, -1.5))),)
    assert b.logprobs == (TokenLogprob(b.token_ids[0], -0.5),)
    assert c.logprobs == ()


def test_a_first_token_that_finishes_the_request():
    group = Group()
    event = group.begin(ask("a", [1, 2], max_tokens=1))
    assert event.finish_reason is FinishReason.LENGTH
    assert group.scheduler.idle()
    assert group.pool.counts().idle()


def test_blocked_sequences_sit_out():
    group = Group()
    for name in "ab":
        group.begin(ask(name, [1, 2]))
    assert [event.request_id for event in group.step({("a", 1)})] == ["b"]
    assert group.step({("a", 1), ("b", 1)}) == ()
    assert [event.output_index for event in group.step()] == [1, 2]


def test_the_youngest_is_suspended_when_all_have_outgrown_their_promise():
    group = Group(num_blocks=6, reserve_output_tokens=1)
    requests = [ask(name, [i] * 4, max_tokens=16) for i, name in enumerate("ab")]
    events = [group.begin(request) for request in requests]
    while not (suspended := group.scheduler.take_suspended()):
        events += group.step()
    assert suspended == (("b", 1),)
    assert group.scheduler.take_suspended() == ()
    emitted = tokens_of(events, ("b", 1))
    assert 0 < len(emitted) < 16
    events += group.run()
    assert tokens_of(events, ("a", 1)) == stream(requests[0])
    again = ask("b", [1] * 4, attempt=2, emitted=emitted, max_tokens=16)
    assert emitted + tokens_of([group.begin(again), *group.run()], ("b", 2)) == stream(requests[1])
    assert group.pool.counts().idle()


def test_an_unused_reservation_goes_before_a_running_sequence():
    group = Group(num_blocks=4, reserve_output_tokens=1)
    request = ask("a", [0] * 4, max_tokens=12)
    events = [group.begin(request)]
    group.add(ask("late", [7] * 4))
    assert group.scheduler.admit()
    events += group.run()
    assert group.scheduler.take_suspended() == (("late", 1),)
    assert tokens_of(events, ("a", 1)) == stream(request)


def test_a_block_is_kept_for_each_that_has_outgrown_its_promise():
    """Else the next one let in would be suspended by the next block that this one needs."""
    group = Group(num_blocks=4, reserve_output_tokens=1)
    group.begin(ask("a", [0] * 4, max_tokens=12))
    group.step()
    group.add(ask("late", [7] * 4, max_tokens=4))
    assert group.pool.available() == 2 and group.scheduler.admit() == ()
    group.run(5)
    assert group.pool.available() == 1 and group.scheduler.admit() == ()
    group.run(6)
    assert group.scheduler.take_suspended() == ()
    assert [admitted.request.request_id for admitted in group.scheduler.admit()] == ["late"]


def test_the_only_one_that_computes_sits_out_until_pulls_have_ended():
    """Blocks under a pull are not taken away, and nobody gains if it yields; whoever waits does not get what it waits for."""
    group = Group(num_blocks=4, reserve_output_tokens=1)
    request = ask("a", [0] * 4, max_tokens=9)
    events = [group.begin(request)]
    group.add(ask("pulling", [7] * 5, max_tokens=2))
    (pulling,) = group.scheduler.admit()
    assert not group.pull(pulling, 1)
    group.add(ask("waits", [8], max_tokens=1))
    for _ in range(6):
        events += group.step()
        assert group.scheduler.take_suspended() == group.scheduler.admit() == ()
    assert group.batch.num_sequences == 0 and group.pool.available() == 0
    assert group.scheduler.cancel(("pulling", 1), quarantine=True)
    events += group.step()
    assert group.batch.num_sequences == 1, "what it had promised and not bound is free"
    assert group.scheduler.admit() == ()
    group.scheduler.quiesced(("pulling", 1))
    events += group.run()
    assert tokens_of(events, ("a", 1)) == stream(request)
    assert [admitted.request.request_id for admitted in group.scheduler.admit()] == ["waits"]


def test_what_comes_up_while_one_sits_out_yields_to_it():
    group = Group(num_blocks=4, reserve_output_tokens=1)
    request = ask("a", [0] * 4, max_tokens=9)
    events = [group.begin(request)]
    group.add(ask("late", [7] * 7, max_tokens=4))
    (late,) = group.scheduler.admit()
    assert group.pull(late)
    for _ in range(6):
        events += group.step()
    assert group.batch.num_sequences == 0
    group.start(("late", 1))
    events += group.run()
    assert group.scheduler.take_suspended() == (("late", 1),)
    assert tokens_of(events, ("a", 1)) == stream(request)


def test_everything_is_promised_if_nothing_may_be_overcommitted():
    group = Group(num_blocks=6, reserve_output_tokens=64)
    for name in "ab":
        group.add(ask(name, [1] * 4, max_tokens=8))
    group.add(ask("c", [1] * 4, max_tokens=1))
    assert [admitted.request.request_id for admitted in group.scheduler.admit()] == ["a", "b"]
    assert group.pool.available() == 0


def test_a_sequence_alone_computes_its_prompt_in_chunks_beside_those_that_run():
    group = Group(max_step_tokens=6)
    running, request = ask("r", [5] * 3, max_tokens=20), ask("a", range(10, 24), attempt=2, emitted=(3, 4), max_tokens=7, num_logprobs=1)
    events = [group.begin(running)]
    group.add(request, alone=True)
    assert [admitted.request for admitted in group.scheduler.admit()] == [request]
    assert group.scheduler.load() == DecodeLoad(waiting=0, pulling=0, computing=1, running=1, waiting_tokens=16)
    lens = []
    for _ in range(3):
        assert group.scheduler.stage(("a", 2)) is Stage.COMPUTING
        events += group.step()
        lens.append(np.diff(group.batch.query_starts).tolist())
    assert lens == [[1, 6], [1, 6], [1, 4]], "a running sequence is in every step"
    first = events[-1]
    assert (first.request_id, first.output_index, first.cached_tokens) == ("a", 2, 0)
    assert len(first.logprobs) == 1
    assert group.scheduler.stage(("a", 2)) is Stage.RUNNING
    events += group.run()
    assert [3, 4, *tokens_of(events, ("a", 2))] == stream_after(request)
    assert tokens_of(events, ("r", 1)) == stream(running)
    assert {event.cached_tokens for event in events[-8:]} == {None}
    assert group.scheduler.idle() and group.pool.counts().idle()


def test_what_one_has_computed_the_next_finds_in_the_tree():
    group = Group()
    group.add(ask("a", range(10, 24), max_tokens=1), alone=True)
    assert group.scheduler.admit()
    events = group.run(3)
    assert [event.finish_reason for event in events] == [FinishReason.LENGTH], "a first token may be the last"
    group.add(ask("b", range(10, 24), max_tokens=2), alone=True)
    (admitted,) = group.scheduler.admit()
    assert admitted.matched_blocks == 3
    (event,) = group.step()
    assert event.cached_tokens == 12
    group.add(ask("c", range(10, 22), max_tokens=2))
    (admitted,) = group.scheduler.admit()
    assert admitted.matched_blocks == 2, "whoever pulls finds it too"


def test_short_prompts_are_not_held_up_by_a_long_one_and_those_of_a_slow_router_wait():
    group = Group(max_step_tokens=8)
    for name, prompt_len in (("long", 30), ("short", 3), ("slow", 3)):
        group.add(ask(name, range(prompt_len), max_tokens=2), alone=True)
    assert len(group.scheduler.admit()) == 3
    assert [event.request_id for event in group.step({("slow", 1)})] == ["short"]
    assert np.diff(group.batch.query_starts).tolist() == [3, 5]


def test_a_prompt_that_is_computed_may_be_suspended_for_one_that_runs():
    group = Group(num_blocks=5, reserve_output_tokens=1, max_step_tokens=4)
    request = ask("a", [0] * 4, max_tokens=14)
    events = [group.begin(request)]
    group.add(ask("alone", range(10, 20), max_tokens=2), alone=True)
    assert group.scheduler.admit()
    for _ in range(14):
        events += group.step(blocked={("alone", 1)})
    assert group.scheduler.take_suspended() == (("alone", 1),)
    assert tokens_of(events, ("a", 1)) == stream(request)
    assert group.pool.counts().idle()


def test_a_prompt_given_up_during_its_chunk_ends_with_the_step():
    group = Group(max_step_tokens=4)
    group.add(ask("a", range(10)), alone=True)
    assert group.scheduler.admit()
    group.plan()
    assert group.scheduler.cancel(("a", 1), quarantine=True)
    assert group.scheduler.stage(("a", 1)) is Stage.ENDING
    assert group.pool.counts().held == 1
    assert group.apply() == ()
    assert group.scheduler.idle() and group.pool.counts().cached == 1


def test_a_prompt_computed_here_goes_slower_beside_sequences_that_run():
    group = Group(max_step_tokens=6, mixed_step_tokens=2)
    group.add(ask("a", [1] * 6, max_tokens=9), alone=True)
    group.scheduler.admit()
    assert group.plan().num_tokens == 6, "nobody waits for it"
    group.apply()
    group.add(ask("b", [2] * 6), alone=True)
    group.scheduler.admit()
    assert group.plan().num_tokens == 1 + 2


@pytest.mark.parametrize("max_step_tokens", [4, 8], ids=["second chunk", "only chunk"])
def test_a_prompt_without_a_token_ends_and_leaves_nothing_in_the_tree(max_step_tokens):
    """Nobody looks at the numbers of a chunk that draws nothing: so what the earlier ones wrote is not to be trusted either."""
    group = Group(max_step_tokens=max_step_tokens)
    group.add(ask("a", range(8)), alone=True)
    assert group.scheduler.admit()
    if max_step_tokens == 4:
        group.step()
    group.plan()
    drawn = group.drawn()
    failed = Sampled(drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs, failed_rows=(0,))
    assert group.merged(group.scheduler.apply(failed)) == ()
    assert group.scheduler.take_failed() == (("a", 1),)
    assert group.pool.counts() == BlockPool(16, SIZE).counts()
    group.pool.check()


def test_a_row_without_a_token_ends_its_sequence_alone():
    group = Group()
    keys = [group.begin(ask(name, [1, 2, 3, 4, 5])) for name in "ab"]
    batch = group.plan()
    drawn = group.drawn()
    failed = Sampled(drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs, failed_rows=(0,))
    events = group.merged(group.scheduler.apply(failed))
    assert batch.num_sequences == 2
    assert [event.request_id for event in events] == ["b"]
    assert group.scheduler.take_failed() == (("a", 1),)
    assert group.scheduler.take_failed() == ()
    assert group.scheduler.stage(("a", 1)) is None
    assert keys


def test_one_that_does_not_fit_is_passed_but_not_for_ever():
    group = Group(num_blocks=4, age_limit=2, max_sequences=2)
    group.begin(ask("holder", [1] * 3, max_tokens=2))
    group.add(ask("large", [2] * 15, max_tokens=1))
    for i in range(3):
        group.add(ask(f"small{i}", [3 + i] * 3, max_tokens=1))
    for i in range(2):
        assert [a.request.request_id for a in group.scheduler.admit()] == [f"small{i}"]
        group.scheduler.cancel((f"small{i}", 1), quarantine=False)
    assert group.scheduler.admit() == ()
    group.run(3)
    assert [a.request.request_id for a in group.scheduler.admit()] == ["large"]


def test_cancelled_pulls_stay_in_quarantine_until_quiesced():
    group = Group()
    group.begin(ask("old", range(10, 18)))
    group.add(ask("a", range(10, 22), attempt=3))
    (admitted,) = group.scheduler.admit()
    assert admitted.matched_blocks == 2
    group.scheduler.bind(("a", 3), 1)
    held = group.pool.counts().held
    assert group.scheduler.cancel(("a", 3), quarantine=True)
    assert not group.scheduler.cancel(("a", 3), quarantine=True)
    assert group.pool.counts().quarantined == 1
    assert group.pool.counts().held == held - 1
    assert not group.scheduler.idle()
    with pytest.raises(InvalidRequest, match="is here already"):
        group.add(ask("a", [1], attempt=3))
    group.scheduler.quiesced(("a", 3))
    group.scheduler.quiesced(("a", 3))
    group.pool.check()
    assert group.pool.counts().quarantined == 0
    assert group.scheduler.stage(("a", 3)) is None


def test_an_attempt_is_cancelled_wherever_it_is():
    group = Group(max_sequences=3)
    group.begin(ask("a", [1] * 4))
    for attempt in (2, 3, 4):
        group.add(ask("a", [attempt] * 4, attempt=attempt))
    admitted = group.scheduler.admit()
    assert [a.request.attempt for a in admitted] == [2, 3]
    group.scheduler.bind(("a", 3), 1)
    group.plan()
    for attempt in (1, 2, 3, 4):
        assert group.scheduler.cancel(("a", attempt), quarantine=False)
    assert group.scheduler.stage(("a", 1)) is Stage.ENDING
    assert group.pool.counts().held == 2, "the step is still writing"
    assert not group.scheduler.cancel(("a", 1), quarantine=True), "it ends already"
    assert group.apply() == ()
    assert group.pool.counts().held == 0
    assert not group.scheduler.cancel(("b", 9), quarantine=True)
    assert group.scheduler.idle()


def test_refusals_name_the_numbers():
    group = Group(num_blocks=4, max_sequences=1, max_waiting=1)
    with pytest.raises(InvalidRequest, match="17 tokens do not fit in 4 blocks of 4"):
        group.add(ask("a", range(9)))
    with pytest.raises(InvalidRequest, match="9 prompt tokens and max_tokens 56 make more than 64"):
        Group(num_blocks=99).add(ask("a", range(9), max_tokens=56))
    group.add(ask("a", [1]))
    group.add(ask("b", [1]))
    with pytest.raises(ResourceExhausted, match="2 sequences wait and 0 run here, at most 2 may"):
        group.add(ask("c", [1]))


class DecodeMachine(RuleBasedStateMachine):
    """Requests, pulls, steps, cancels and suspensions in any order, also between plan and apply.

    A suspended sequence comes back as a new attempt, as the router would send it; every answer that ends must be the
    one of an undisturbed run.
    """

    kind = DecodeScheduler

    @initialize(
        num_blocks=st.integers(7, 14),
        max_sequences=st.integers(1, 4),
        reserve_output_tokens=st.sampled_from([1, 4, 100]),
        max_step_tokens=st.integers(1, 9),
        mixed_step_tokens=st.integers(1, 9),
    )
    def make(self, num_blocks, **limits):
        self.group = Group(num_blocks, self.kind, age_limit=2, **limits)
        self.limits = limits
        self.attempts = {}  # newest attempt of each request
        self.emitted = {}  # delivered tokens of each request
        self.pulls = {}  # admitted sequences whose pull is under way
        self.quarantined = {}
        self.planned = False
        self.num_added = 0

    @property
    def scheduler(self):
        return self.group.scheduler

    @rule(
        prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=3),
        max_tokens=st.integers(1, 14),
        stops=st.sampled_from([(), (STOP,), (STOP, 2), (3, STOP, 2)]),
        alone=st.booleans(),
        how=st.sampled_from(
            [{}, {"num_logprobs": 1}, {"min_tokens": 3, "seed": 2**63 - 1}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}]
        ),
    )
    def add(self, prompts, max_tokens, stops, alone, how):
        for prompt in prompts:
            self.num_added += 1
            self.send(ask(f"r{self.num_added}", prompt, max_tokens=max_tokens, stop_token_ids=stops, **how), alone)
        self.admit()

    def send(self, request, alone):
        try:
            self.group.add(request, alone)
        except (ResourceExhausted, InvalidRequest):
            self.emitted.pop(request.request_id, None)
            return
        self.attempts[request.request_id] = request.attempt
        self.emitted.setdefault(request.request_id, [])

    def admit(self):
        for admitted in self.scheduler.admit():
            if self.scheduler.stage(admitted.request.key) is Stage.ADMITTED:
                self.pulls[admitted.request.key] = admitted

    def pulling(self, which):
        keys = sorted(self.pulls)
        return keys[which % len(keys)]

    @rule(which=st.integers(0, 9), counts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
    def pull_some(self, which, counts):
        for count in counts:
            if self.pulls:
                self.pull(which, count)

    def pull(self, which, count):
        key = self.pulling(which)
        if self.group.pull(self.pulls[key], count):
            hypothesis.event("pulled")
            del self.pulls[key]
            self.deliver([self.group.start(key)])

    @rule(halves=st.integers(1, 9), blocked=st.sets(st.integers(0, 9), max_size=2))
    def run(self, halves, blocked):
        """Steps; an odd number of halves leaves one between plan and apply, or ends there."""
        for _ in range(halves):
            self.apply() if self.planned else self.plan(blocked)

    def plan(self, blocked=frozenset()):
        keys = sorted(self.attempts.items())
        batch = self.group.plan({keys[i] for i in blocked if i < len(keys)})
        assert batch.num_sequences <= self.limits["max_sequences"]
        self.planned = True
        for request_id, attempt in self.scheduler.take_suspended():
            hypothesis.event("suspended")
            self.pulls.pop((request_id, attempt), None)
            self.group.tables.pop((request_id, attempt), None)
            assert self.attempts[request_id] == attempt
            self.send_again(request_id)

    def send_again(self, request_id):
        old = self.group.requests[request_id, self.attempts[request_id]]
        new = SequenceRequest(request_id, old.attempt + 1, old.prompt_ids, old.sampling, tuple(self.emitted[request_id]))
        self.send(new, alone=old.attempt % 2 == 0)

    def apply(self):
        self.deliver(self.group.apply())
        self.planned = False
        self.admit()

    @rule(place=st.integers(0, 9))
    def fail(self, place):
        """A step from one of whose rows nothing can be drawn."""
        if not self.planned or not len(self.group.batch.sample_rows):
            return
        drawn = self.group.drawn()
        failed = dataclasses.replace(drawn, failed_rows=(place % len(drawn.token_ids),))
        self.deliver(self.group.merged(self.scheduler.apply(failed)))
        self.planned = False
        for request_id, attempt in self.scheduler.take_failed():
            assert self.attempts.pop(request_id) == attempt
            del self.emitted[request_id]
        self.admit()

    def deliver(self, events):
        for event in events:
            assert self.attempts[event.request_id] == event.attempt, "an attempt that is over says nothing"
            emitted = self.emitted[event.request_id]
            assert event.output_index == len(emitted)
            emitted += event.token_ids
            if event.finish_reason:
                assert emitted == stream(self.group.requests[event.request_id, event.attempt])
                del self.emitted[event.request_id], self.attempts[event.request_id]

    @rule(which=st.integers(0, 9), quarantine=st.booleans())
    def cancel(self, which, quarantine):
        if not self.attempts:
            return
        keys = sorted(self.group.tables if quarantine and self.group.tables else self.attempts.items())
        key = keys[which % len(keys)]
        landing = quarantine and self.scheduler.stage(key) is Stage.PULLING
        hypothesis.event("quarantined" if landing else "cancelled")
        assert self.scheduler.cancel(key, quarantine=quarantine)
        self.quarantined |= {key: None} if landing else {}
        self.pulls.pop(key, None)
        self.group.tables.pop(key, None)
        del self.attempts[key[0]], self.emitted[key[0]]

    @rule()
    def quiesce(self):
        if self.quarantined:
            self.scheduler.quiesced(self.quarantined.popitem()[0])
            self.admit()

    @invariant()
    def pool_is_sound(self):
        self.group.pool.check()
        assert bool(self.group.pool.counts().quarantined) is bool(self.quarantined)
        assert not self.scheduler.idle() or self.group.pool.counts().idle()

    @invariant()
    def pulled_blocks_are_nobody_elses(self):
        bound = [block for pairs in self.group.tables.values() for block, _ in pairs]
        assert len(set(bound)) == len(bound)
        for pairs in self.group.tables.values():
            assert all(self.group.pool.generation(block) == generation for block, generation in pairs)

    def teardown(self):
        if self.planned:
            self.apply()
        while self.quarantined:
            self.quiesce()
        for _ in range(600):
            if self.scheduler.idle():
                break
            self.admit()
            while self.pulls:
                self.pull(0, 9)
            self.plan()
            self.apply()
        assert self.scheduler.idle(), "a sequence waits for ever"
        assert not self.attempts
        assert self.group.pool.counts().idle()


TestDecode = DecodeMachine.TestCase
TestDecode.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Twins:
    """The production scheduler and the plain one, each with a pool of its own: both are told the same and must do the same."""

    def __init__(self, pool, **limits):
        self.fast = DecodeScheduler(pool, **limits)
        self.plain = PlainScheduler(BlockPool(pool.num_blocks, pool.block_size), **limits)
        self.pools = pool, self.plain._pool
        self.order = []  # of the plain one's drawn rows, among those of the other

    def both(self, name, *args, **more):
        fast, plain = (getattr(scheduler, name)(*args, **more) for scheduler in (self.fast, self.plain))
        assert fast == plain, name
        assert self.pools[0].counts() == self.pools[1].counts(), name
        return fast

    def __getattr__(self, name):
        return functools.partial(self.both, name)

    def add(self, request, **more):
        refusals = []
        for scheduler in (self.fast, self.plain):
            try:
                scheduler.add(request, **more)
            except (ResourceExhausted, InvalidRequest) as error:
                refusals.append(error)
        if refusals:
            assert str(refusals[0]) == str(refusals[1])
            raise refusals[0]

    def plan(self, blocked=frozenset()):
        fast, plain = self.fast.plan(blocked), self.plain.plan(blocked)
        assert sorted(rows_of(fast)) == sorted(rows_of(plain))
        assert [new.tolist() for new in (fast.new_blocks, fast.new_generations)] == [
            new.tolist() for new in (plain.new_blocks, plain.new_generations)
        ]
        places = {row: place for place, row in enumerate(row for row in rows_of(fast) if row[3])}
        self.order = [places[row] for row in rows_of(plain) if row[3]]
        return fast

    def apply(self, sampled):
        order = self.order
        columns = (sampled.token_ids, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)
        failed = tuple(order.index(row) for row in sampled.failed_rows)
        reordered = Sampled(*(column[order] for column in columns), failed_rows=failed)
        applied, plain = self.fast.apply(sampled), list(self.plain.apply(reordered))
        drawn = [TokenEvent(name, attempt, index, (token,)) for name, attempt, index, token in applied.drawn.rows()]
        assert all(event.finish_reason or event.logprobs or event.cached_tokens is not None for event in applied.events)
        assert sorted([*drawn, *applied.events], key=repr) == sorted(plain, key=repr)
        assert self.pools[0].counts() == self.pools[1].counts()
        return applied


def rows_of(batch):
    """What a batch computes and draws, sequence by sequence, as values that can be compared and sorted."""
    draws, banned = iter(range(len(batch.sample_rows))), batch.banned_ids.tolist()
    rows = []
    for s in range(batch.num_sequences):
        span = slice(*batch.query_starts[s : s + 2].tolist())
        context = int(batch.context_lens[s])
        assert batch.positions[span].tolist() == list(range(context - (span.stop - span.start), context))
        sample = ()
        if span.stop - 1 in batch.sample_rows:
            i = next(draws)
            columns = (batch.seeds, batch.output_indices, batch.temperatures, batch.top_ks, batch.top_ps, batch.min_ps, batch.num_logprobs)
            sample = (*(column[i].item() for column in columns), *banned[slice(*batch.banned_starts[i : i + 2].tolist())])
        table = batch.block_tables[s].tolist()
        assert not any(table[blocks_for(context, SIZE) :]), "tables are padded with 0"
        rows.append((tuple(batch.token_ids[span].tolist()), context, tuple(table[: blocks_for(context, SIZE)]), sample))
    assert next(draws, None) is None
    return rows


class TwinMachine(DecodeMachine):
    """The same, with a plain scheduler beside the other."""

    kind = Twins


TestTwins = TwinMachine.TestCase
TestTwins.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class Crowd:
    """More sequences than the pool can hold at once, sent again whenever they are suspended, until all have their answers.

    pull_steps: how long a pull takes, by the number of its admission. return_steps: how long the router takes to send one again.
    """

    def __init__(self, group, requests, alone, pull_steps, return_steps):
        self.group, self.alone, self.pull_steps, self.return_steps = group, alone, pull_steps, return_steps
        self.emitted = {request.request_id: [] for request in requests}
        self.coming = [(0, request) for request in requests]
        self.pulling = []
        self.finished = {}
        self.arrived = []  # keys by arrival: older ones have precedence
        self.num_suspended = 0

    def turn(self, now):
        """One step and what surrounds it: arrivals, pulls that have ended, what was suspended."""
        scheduler = self.group.scheduler
        for _, request in [item for item in self.coming if item[0] <= now]:
            self.group.add(request, alone=request.request_id in self.alone)
            self.arrived.append(request.key)
        self.coming = [item for item in self.coming if item[0] > now]
        for admitted in scheduler.admit():
            if scheduler.stage(admitted.request.key) is Stage.ADMITTED:
                steps = self.pull_steps[len(self.arrived) % len(self.pull_steps)]
                self.pulling.append((now + steps, admitted))
                if steps % 2:  # its promise is firm before its pull has ended
                    scheduler.bind(admitted.request.key, 0)
        for _, admitted in [item for item in self.pulling if item[0] <= now]:
            assert self.group.pull(admitted)
            self.take([self.group.start(admitted.request.key)], now)
        self.pulling = [item for item in self.pulling if item[0] > now]
        self.step(now)

    def step(self, now):
        before = [key for key in self.arrived if self.group.scheduler.stage(key) in (Stage.COMPUTING, Stage.RUNNING)]
        self.group.plan()
        for key in self.group.scheduler.take_suspended():
            assert key != before[0], "the oldest that computes has to get on"
            self.num_suspended += 1
            self.pulling = [item for item in self.pulling if item[1].request.key != key]
            old = self.group.requests[key]
            again = SequenceRequest(key[0], key[1] + 1, old.prompt_ids, old.sampling, tuple(self.emitted[key[0]]))
            self.coming.append((now + self.return_steps, again))
        self.take(self.group.apply(), now)
        self.group.pool.check()

    def take(self, events, now):
        for event in events:
            self.emitted[event.request_id] += event.token_ids
            if event.finish_reason:
                self.finished[event.request_id] = now


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(8, 12),
    lens=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=2, max_size=7),
    alone=st.sets(st.integers(0, 6)),
    pull_steps=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    return_steps=st.integers(1, 4),
    reserve_output_tokens=st.sampled_from([1, 4]),
    max_step_tokens=st.integers(1, 8),
    mixed_step_tokens=st.integers(1, 8),
)
def test_however_full_the_pool_is_somebody_always_gets_on(num_blocks, lens, alone, pull_steps, return_steps, **limits):
    """Two sequences that suspend each other in turn would both wait for ever. Bounds: tokens of one answer and its pull, and a few turns
    of others, until the next one has finished."""
    requests = [ask(f"r{i}", [i] * prompt_len, max_tokens=max_tokens) for i, (prompt_len, max_tokens) in enumerate(lens)]
    group = Group(num_blocks, max_sequences=len(lens), **limits)
    crowd = Crowd(group, requests, {f"r{i}" for i in alone}, pull_steps, return_steps)
    now = last = 0
    while len(crowd.finished) < len(requests):
        crowd.turn(now)
        last = max([last, *crowd.finished.values()])
        assert now - last < 40 * len(requests), "nobody gets on"
        now += 1
    hypothesis.event(f"suspended {min(crowd.num_suspended, 5)} times or more")
    assert crowd.emitted == {request.request_id: stream(request) for request in requests}
    assert group.scheduler.idle() and group.pool.counts().idle()
