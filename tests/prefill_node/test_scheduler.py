"""The prefill scheduler against a memory that remembers what was written where: right content, one writer, nothing lost."""

import hypothesis
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.engine.batch import Sampled
from baton.engine.blocks import BlockPool, blocks_for
from baton.errors import InvalidRequest, ResourceExhausted, Unavailable
from baton.request import FinishReason, Sampling, SequenceRequest
from prefill_node.scheduler import PROMPT_LIFE, PrefillScheduler, PromptEvent, Stage

SIZE = 4
STOP = 9


def token_after(request):
    """What our model says after these tokens: sometimes STOP."""
    return (sum(request.prompt_ids) + 3 * sum(request.emitted_ids) + len(request.prompt_ids)) % 10


def ask(request_id, prompt, attempt=1, emitted=(), **sampling):
    return SequenceRequest(request_id, attempt, tuple(prompt), Sampling(**{"max_tokens": 8, **sampling}), tuple(emitted))


class Node:
    """What surrounds the scheduler: block memory as tokens, and the requests behind the rows of a step."""

    def __init__(self, num_blocks=16, **limits):
        self.pool = BlockPool(num_blocks, SIZE)
        limits = {"max_step_tokens": 8, "max_sequences": 3, "max_waiting": 20, "max_unaccepted": 2, "max_model_len": 64, **limits}
        self.scheduler = PrefillScheduler(self.pool, **limits)
        self.memory = {}
        self.written = {}  # by slot: the generation of its block when it was last written
        self.batch = None

    def plan(self):
        """Plan a step and write what it computes; the batch."""
        batch = self.batch = self.scheduler.plan()
        assert [self.pool.generation(block) for block in batch.new_blocks.tolist()] == batch.new_generations.tolist()
        for s in range(batch.num_sequences):
            end, table = int(batch.context_lens[s]), batch.block_tables[s].tolist()
            tokens = batch.token_ids[batch.query_starts[s] : batch.query_starts[s + 1]].tolist()
            for position, token in enumerate(tokens, end - len(tokens)):
                slot = (table[position // SIZE], position % SIZE)
                life = self.pool.generation(slot[0])
                assert self.written.get(slot) != life, "a slot is written once before its block is taken again"
                self.written[slot] = life
                self.memory[slot] = token
        return batch

    def drawn(self):
        """What the planned step sampled: our model reads the whole context from memory."""
        batch, tokens = self.batch, []
        for s in range(batch.num_sequences):
            if int(batch.query_starts[s + 1]) - 1 in batch.sample_rows.tolist():
                context = self.content(batch.block_tables[s].tolist(), int(batch.context_lens[s]))
                tokens.append(self.model(context))
        count = len(tokens)
        return Sampled(
            np.array(tokens, np.int64), np.zeros(count, np.float32), np.zeros((count, 0), np.int64), np.zeros((count, 0), np.float32)
        )

    @staticmethod
    def model(context):
        """A token that depends on every token before it."""
        value = 0
        for token in context:
            value = (7 * value + token + 1) % 9973
        return value % 10

    def content(self, blocks, length):
        return [self.memory[blocks[i // SIZE], i % SIZE] for i in range(length)]

    def step(self):
        """make_room, plan, apply; the revoked leases and the outcome."""
        revoked = self.scheduler.make_room()
        self.plan()
        return revoked, self.scheduler.apply(self.drawn())

    def run(self, steps=20):
        """Steps until nothing can run; all events, announcements and ended leases."""
        events, announced, ended = [], [], []
        for _ in range(steps):
            _, outcome = self.step()
            events += outcome.events
            announced += outcome.announcements
            ended += outcome.ended
        return events, announced, ended


def test_a_long_prompt_goes_in_chunks_and_is_announced_as_it_grows():
    node = Node()
    prompt = list(range(10, 29))
    node.scheduler.add(ask("a", prompt), lease=5)
    node.scheduler.accept(5)
    outcomes = [node.step()[1] for _ in range(3)]
    assert [[len(a.blocks) for a in outcome.announcements] for outcome in outcomes] == [[2], [2], [1]]
    assert [outcome.announcements[0].first_block for outcome in outcomes] == [0, 2, 4]
    final = outcomes[2].announcements[0].final
    assert outcomes[2].events == (final,)
    assert (final.output_index, final.token_ids, final.cached_tokens) == (0, (Node.model(prompt),), 0)
    blocks = [block for outcome in outcomes for block, _ in outcome.announcements[0].blocks]
    assert node.content(blocks, 19) == prompt
    assert node.scheduler.load().leases == 1
    node.scheduler.release(5)
    assert node.scheduler.idle()
    assert node.pool.counts().cached == 4, "the last block is not full"


def test_a_cached_prefix_is_not_computed_again():
    node = Node()
    prompt = list(range(10, 22))
    for name in ("a", "b"):
        node.scheduler.add(ask(name, prompt), lease=0)
        events, announced, ended = node.run(3)
        assert announced == ended == []
        assert events[0].cached_tokens == (0 if name == "a" else 8), "the block of the last token is always computed"
    assert node.pool.counts().idle()


def test_an_attempt_goes_on_behind_the_emitted_tokens():
    node = Node()
    node.scheduler.add(ask("a", [1, 2, 3], attempt=4, emitted=[7, 8], min_tokens=3, stop_token_ids=(STOP,)), lease=0)
    batch = node.plan()
    assert batch.token_ids.tolist() == [1, 2, 3, 7, 8]
    assert batch.output_indices.tolist() == [2]
    assert batch.banned_ids.tolist() == [STOP]
    (event,) = node.scheduler.apply(node.drawn()).events
    assert (event.attempt, event.output_index) == (4, 2)


@pytest.mark.parametrize("pulled", [False, True])
def test_a_request_that_ends_with_its_first_token(pulled):
    node = Node()
    node.scheduler.add(ask("a", range(6), max_tokens=1), lease=3)
    if pulled:
        node.scheduler.opened(3)
    _, outcome = node.step()
    (announced,) = outcome.announcements
    assert announced.final.finish_reason is FinishReason.LENGTH
    assert len(announced.blocks) == (2 if pulled else 0)
    assert outcome.ended == (() if pulled else (3,))
    assert node.scheduler.idle() is not pulled
    assert node.scheduler.closed(3) is pulled
    assert node.scheduler.idle()
    assert node.pool.counts().idle()


@pytest.mark.parametrize("pulled", [False, True])
def test_a_prompt_without_a_token_fails_and_leaves_nothing(pulled):
    node = Node()
    node.scheduler.add(ask("a", range(6)), 7)
    if pulled:
        node.scheduler.opened(7)
    node.plan()
    drawn = node.drawn()
    outcome = node.scheduler.apply(Sampled(drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs, failed_rows=(0,)))
    assert outcome.failed == (("a", 1),)
    assert outcome.events == outcome.announcements == ()
    assert node.pool.counts().held == (2 if pulled else 0)
    node.scheduler.release(7)
    assert node.scheduler.idle() and node.pool.counts().idle() and node.pool.counts().cached == 0


def test_what_a_prompt_without_a_token_wrote_before_is_not_trusted_either_but_what_it_found_is():
    node = Node()
    node.scheduler.add(ask("before", range(6)), lease=0)
    node.run()
    node.scheduler.add(ask("a", [*range(4), *range(50, 65)]), lease=0)
    node.step()
    assert node.pool.counts().held > 1
    node.plan()
    while not len(node.batch.sample_rows):
        node.scheduler.apply(node.drawn())
        node.plan()
    drawn = node.drawn()
    node.scheduler.apply(Sampled(drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs, failed_rows=(0,)))
    assert node.scheduler.idle() and node.pool.counts().idle() and node.pool.counts().cached == 1
    node.pool.check()


def test_unaccepted_prompts_are_bounded():
    node = Node(max_unaccepted=1)
    for i in range(3):
        node.scheduler.add(ask(f"{i}", [i] * 4), lease=i + 1)
    assert len(node.run()[0]) == 1
    node.scheduler.accept(2)
    assert [event.request_id for event in node.run()[0]] == ["1"]
    node.scheduler.accept(1)
    assert [event.request_id for event in node.run()[0]] == ["2"]


def test_the_youngest_unaccepted_lease_makes_room_and_is_computed_again():
    node = Node(num_blocks=6)
    for i in range(2):
        node.scheduler.add(ask(f"{i}", [i] * 8), lease=i + 1)
    first, _, _ = node.run()
    node.scheduler.add(ask("wanted", [7] * 16), lease=3)
    assert node.scheduler.make_room() == (), "it is not accepted either"
    node.scheduler.accept(3)
    revoked, _ = node.step()
    assert revoked == (2,)
    node.pool.check()
    assert [event.request_id for event in node.run()[0]] == ["wanted"]
    node.scheduler.release(3)
    assert node.run()[0] == [], "a revoked prompt waits for a decode group"
    node.scheduler.accept(2)
    again, announced_again, _ = node.run()
    assert [event.token_ids for event in again] == [first[1].token_ids]
    assert [len(a.blocks) for a in announced_again] == [2]
    assert node.content([block for block, _ in announced_again[0].blocks], 8) == [1] * 8


def test_nothing_is_revoked_in_vain():
    node = Node(num_blocks=8)
    node.scheduler.add(ask("held", [1] * 16), lease=1)
    node.scheduler.accept(1)
    node.scheduler.add(ask("unwanted", [2] * 8), lease=2)
    node.run()
    node.scheduler.add(ask("wanted", [3] * 32), lease=3)
    node.scheduler.accept(3)
    assert node.scheduler.make_room() == ()
    assert node.scheduler.load().waiting_tokens == 32
    node.scheduler.release(1)
    assert node.scheduler.make_room() == (2,)


def test_a_pull_keeps_its_lease_for_as_long_as_it_is_open():
    """A decode group that accepted and died must not hold up, with a lease that nobody reads, those that others wait for."""
    node = Node(num_blocks=4)
    node.scheduler.add(ask("a", [1] * 16), lease=1)
    first, _, _ = node.run()
    node.scheduler.opened(1)
    node.scheduler.add(ask("b", [2] * 4), lease=0)
    assert node.scheduler.make_room() == () and not node.run()[0]
    assert not node.scheduler.closed(1)
    revoked, outcome = node.step()
    assert revoked == (1,) and [event.request_id for event in outcome.events] == ["b"]
    node.scheduler.accept(1)
    assert node.run()[0] == first, "another group has room for it"


def test_what_was_drawn_is_drawn_once():
    """The router may have delivered it: a second computation, in another batch, could come to another token where two are nearly tied."""
    node = Node(num_blocks=4, max_step_tokens=16)
    node.scheduler.add(ask("a", [1] * 16), lease=1)
    first, _, _ = node.run()
    node.scheduler.add(ask("b", [2] * 4), lease=0)
    assert node.step()[0] == (1,)
    node.scheduler.accept(1)
    node.plan()
    drawn = node.drawn()
    other = Sampled((drawn.token_ids + 1) % 10, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
    (event,) = node.scheduler.apply(other).events
    assert event == first[0]


def test_one_that_does_not_fit_is_passed_but_not_for_ever():
    node = Node(num_blocks=4, age_limit=2, max_step_tokens=100, max_sequences=9)
    node.scheduler.add(ask("holder", [1] * 4), lease=1)
    node.scheduler.accept(1)
    node.run(1)
    node.scheduler.add(ask("large", [2] * 16), lease=0)
    for i in range(3):
        node.scheduler.add(ask(f"small{i}", [3 + i] * 4), lease=0)
    assert [event.request_id for event in node.run()[0]] == ["small0", "small1"], "there was room for all three"
    node.scheduler.release(1)
    assert [event.request_id for event in node.run()[0]] == ["large", "small2"]


def shorts(node, number):
    """A prompt of four tokens that no other begins with."""
    name = f"short{number}"
    node.scheduler.add(ask(name, [100 + number] * 4), lease=0)
    return name


@pytest.mark.parametrize("num_long", [1, 3])
def test_a_short_prompt_does_not_wait_for_long_ones(num_long):
    node = Node(num_blocks=64, max_sequences=9)
    for i in range(num_long):
        node.scheduler.add(ask(f"long{i}", [10 + i] * 60), lease=0)
    node.step()
    for number in range(4):
        name = shorts(node, number)
        assert [event.request_id for event in node.step()[1].events] == [name]


def test_a_long_prompt_comes_to_its_end_however_many_short_ones_come():
    node = Node(num_blocks=64, max_sequences=9, max_waiting=200)
    node.scheduler.add(ask("long", [1] * 60), lease=0)
    ended = []
    for number in range(40):  # a step and a half each time: they are never all done
        for more in range(3):
            shorts(node, 3 * number + more)
        ended += [event.request_id for event in node.step()[1].events]
        if "long" in ended:
            break
    assert number <= 60 // 4
    assert len(ended) >= number, "the short ones had the other half"


def test_long_prompts_do_not_take_turns():
    """Equally long ones are done one after the other, by age: sharing would make the first one late and help nobody."""
    node = Node(num_blocks=64, max_sequences=9)
    for i in range(3):
        node.scheduler.add(ask(f"{i}", [i] * 16), lease=0)
    ended = [[event.request_id for event in node.step()[1].events] for _ in range(6)]
    assert ended == [[], ["0"], [], ["1"], [], ["2"]]


def test_what_is_cached_makes_a_prompt_short():
    node = Node(num_blocks=64, max_sequences=9)
    node.scheduler.add(ask("before", [5] * 40), lease=0)
    node.run(8)
    node.scheduler.add(ask("long", [1] * 60), lease=0)
    node.step()
    node.scheduler.add(ask("other", [2] * 20), lease=0)
    node.scheduler.add(ask("again", [5] * 40 + [6, 6]), lease=0)
    assert [event.request_id for event in node.step()[1].events] == ["again"]


def test_cancel_takes_this_attempt_and_all_before_it():
    node = Node(num_blocks=16)
    for attempt in (1, 2, 3):
        node.scheduler.add(ask("a", [attempt] * 8, attempt=attempt), lease=attempt)
        node.scheduler.accept(attempt)
    node.run(1)
    for name, attempt in (("a", 2), ("a", 2), ("b", 7)):
        node.scheduler.cancel(name, attempt)
    assert [event.attempt for event in node.run()[0]] == [3]
    assert node.scheduler.load().leases == 1


def test_blocks_of_a_cancelled_prompt_outlive_its_step_and_its_pull():
    node = Node()
    node.scheduler.add(ask("a", range(8)), lease=1)
    node.scheduler.opened(1)
    node.plan()
    node.scheduler.cancel("a", 1)
    assert node.pool.counts().held == 2, "the step is still writing"
    with pytest.raises(Unavailable, match="is here") as late:
        node.scheduler.add(ask("a", range(8)), lease=2)
    assert late.value.retryable, "it is over, and whoever asks again may well be another router"
    outcome = node.scheduler.apply(node.drawn())
    assert (outcome.events, outcome.announcements, outcome.ended) == ((), (), ())
    assert node.pool.counts().held == 2, "the pull may still be reading"
    assert node.scheduler.closed(1)
    assert node.pool.counts().cached == 2
    assert node.scheduler.idle()


def test_a_cancel_during_the_step_is_reported_when_the_blocks_are_given_up():
    node = Node()
    node.scheduler.add(ask("a", range(8)), lease=1)
    node.plan()
    node.scheduler.release(1)
    assert not node.scheduler.idle()
    assert node.scheduler.apply(node.drawn()).ended == (1,)
    assert node.scheduler.idle()


def test_a_waiting_prompt_is_gone_at_once():
    node = Node()
    node.scheduler.add(ask("a", range(8)), lease=1)
    node.scheduler.opened(1)
    node.scheduler.release(1)
    assert node.scheduler.idle()


def test_messages_about_strangers_are_ignored():
    node = Node()
    for late in (node.scheduler.accept, node.scheduler.opened, node.scheduler.closed, node.scheduler.release):
        late(77)
    node.scheduler.cancel("stranger", 77)
    node.scheduler.add(ask("a", range(8)), lease=1)
    node.scheduler.closed(1)
    assert len(node.run()[0]) == 1


def test_refusals_name_the_numbers():
    node = Node(num_blocks=4, max_sequences=1, max_waiting=1)
    add = node.scheduler.add
    with pytest.raises(InvalidRequest, match="17 tokens do not fit in 4 blocks of 4"):
        add(ask("a", range(17)), 1)
    with pytest.raises(InvalidRequest, match="64 tokens, at most 63"):
        add(ask("a", range(64)), 1)
    with pytest.raises(InvalidRequest, match="empty"):
        add(ask("a", []), 1)
    with pytest.raises(InvalidRequest, match="all of its 2 max_tokens"):
        add(ask("a", [1], emitted=[2, 3], max_tokens=2), 1)
    add(ask("a", [1]), 1)
    for request, lease in ((ask("a", [1]), 2), (ask("b", [1]), 1)):
        with pytest.raises(Unavailable, match="is here"):
            add(request, lease)
    add(ask("b", [1]), 0)
    with pytest.raises(ResourceExhausted, match="2 prompts wait and 0 run here, at most 2 may") as full:
        add(ask("c", [1]), 0)
    assert full.value.retryable
    assert full.value.retry_after_s


def test_one_that_nobody_wants_yet_holds_up_nobody():
    """It is older, too large and was passed often, but no decode group has room for it: the wanted one starts."""
    node = Node(num_blocks=4, age_limit=1, max_unaccepted=1)
    node.scheduler.add(ask("holder", [9] * 4), lease=1)
    node.scheduler.accept(1)
    node.run(1)
    node.scheduler.add(ask("unwanted", [1] * 16), lease=2)
    for i in range(5):
        name = f"wanted{i}"
        node.scheduler.add(ask(name, [2 + i] * 12), lease=0)
        assert [event.request_id for event in node.run(3)[0]] == [name]


@pytest.mark.parametrize("num_older", [0, 1, 3])
def test_a_prompt_that_is_always_the_longest_starts_although_older_ones_find_no_room(num_older):
    node = Node(num_blocks=24, max_sequences=4, max_waiting=500, age_limit=4, max_model_len=96)
    node.scheduler.add(ask("holder", [9] * 32), lease=1)
    node.scheduler.accept(1)
    node.run(4)
    for i in range(num_older):
        node.scheduler.add(ask(f"too large {i}", [10 + i] * 92), lease=0)
    node.scheduler.add(ask("long", [1] * 40), lease=0)
    ended = []
    for number in range(60):
        for more in range(3):
            shorts(node, 3 * number + more)
        ended += [event.request_id for event in node.step()[1].events]
        if "long" in ended:
            break
    assert "long" in ended and number <= 2 * 40 // 4
    node.scheduler.release(1)
    for number in range(60, 160):
        shorts(node, 3 * number)
        ended += [event.request_id for event in node.step()[1].events]
    assert {f"too large {i}" for i in range(num_older)} <= set(ended), "and they, once there is room, before the younger ones"


def test_every_drawn_event_happens_and_nothing_else():
    assert {event for _, event in PROMPT_LIFE.table} == set(PromptEvent)
    assert {stage for stage in Stage if PROMPT_LIFE.ends(stage)} == {Stage.ENDED}


WHICH = st.integers(0, 9)


class PrefillMachine(RuleBasedStateMachine):
    """Requests, pulls, cancels and steps in any order, also between plan and apply."""

    @initialize(
        num_blocks=st.integers(6, 12),
        max_step_tokens=st.sampled_from([3, 8, 20]),
        max_sequences=st.integers(1, 4),
        max_unaccepted=st.integers(0, 3),
    )
    def make(self, num_blocks, **limits):
        self.node = Node(num_blocks, age_limit=2, **limits)
        self.limits = limits
        self.requests = {}  # by lease number (drawn for lease 0 too)
        self.leased = {}
        self.accepted = set()
        self.read = set()  # leases that had a pull
        self.pulls = {}  # open pulls per lease
        self.ending = set()  # leases given up while a pull reads
        self.announced = {}  # blocks of a lease since it was last computed
        self.computed = set()  # leases whose last announcement was made
        self.events = {}
        self.planned = False

    @property
    def scheduler(self):
        return self.node.scheduler

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda tokens: tokens * 3),
        emitted=st.lists(st.integers(0, 1), max_size=3),
        leased=st.booleans(),
        short=st.booleans(),
    )
    def add(self, prompt, emitted, leased, short):
        number = len(self.requests) + 1
        sampling = {"max_tokens": len(emitted) + 1} if short else {"max_tokens": 8, "stop_token_ids": (STOP,)}
        request = ask(f"r{number % 5}", prompt, attempt=number, emitted=emitted, **sampling)
        try:
            self.scheduler.add(request, number if leased else 0)
        except (ResourceExhausted, InvalidRequest, Unavailable):
            return
        self.requests[request.key] = request
        self.leased |= {number: request} if leased else {}

    @rule(which=WHICH, how=st.sampled_from(["accept", "open", "close", "close", "release", "cancel"]))
    def hear_of_a_lease(self, which, how):
        if how == "close":
            self.close()
        elif self.leased:
            getattr(self, how)(sorted(self.leased)[which % len(self.leased)])

    def accept(self, number):
        self.scheduler.accept(number)
        self.accepted.add(number)

    def open(self, number):
        self.scheduler.opened(number)
        self.accepted.add(number)
        self.read.add(number)
        self.pulls[number] = self.pulls.get(number, 0) + 1

    def close(self):
        """One pull leaves; the node says so when it was the last of its lease."""
        for number in tuple(self.pulls)[:1]:
            self.pulls[number] -= 1
            if not self.pulls[number]:
                del self.pulls[number]
                self.accepted.discard(number)
                given_up = self.scheduler.closed(number)
                assert not given_up or number in self.ending
                if number in self.ending:
                    self.over(number)

    def release(self, number):
        self.scheduler.release(number)
        self.over(number)

    def cancel(self, number):
        name, attempt = self.leased[number].key
        self.scheduler.cancel(name, attempt)
        for ended in [other for other, request in self.leased.items() if request.request_id == name and request.attempt <= attempt]:
            self.give_up(ended)

    def over(self, number):
        self.leased.pop(number, None)
        self.pulls.pop(number, None)
        self.announced.pop(number, None)
        self.ending.discard(number)

    def give_up(self, number):
        """The request is over; its blocks are watched for as long as a pull reads them."""
        if self.pulls.get(number):
            self.ending.add(number)
        else:
            self.over(number)

    @rule(halves=st.integers(1, 9))
    def run(self, halves):
        """Steps; an odd number of halves leaves one between plan and apply, or ends there."""
        for _ in range(halves):
            self.apply() if self.planned else self.plan()

    def plan(self):
        for lease in self.scheduler.make_room():
            hypothesis.event("revoked")
            assert lease not in self.accepted
            self.announced.pop(lease)
            self.computed.discard(lease)
        batch = self.node.plan()
        assert batch.num_tokens <= self.limits["max_step_tokens"]
        assert batch.num_sequences <= self.limits["max_sequences"]
        self.planned = True

    def apply(self):
        outcome = self.scheduler.apply(self.node.drawn())
        self.planned = False
        for event in outcome.events:
            request = self.requests[event.request_id, event.attempt]
            assert self.events.setdefault(request.key, event) is event, "one event per prompt, however often it is computed"
            assert event.output_index == len(request.emitted_ids)
            assert event.token_ids == (Node.model([*request.prompt_ids, *request.emitted_ids]),)
            assert event.cached_tokens % SIZE == 0
        for announced in outcome.announcements:
            self.check_announcement(announced)
            self.computed |= {announced.lease} if announced.final else set()
            if announced.final and announced.final.finish_reason and self.pulls.get(announced.lease):
                self.ending.add(announced.lease)
        for number in outcome.ended:
            self.over(number)

    def check_announcement(self, announced):
        request = self.leased[announced.lease]
        blocks = self.announced.setdefault(announced.lease, [])
        assert announced.first_block == len(blocks)
        blocks += announced.blocks
        self.check_content(announced.lease)
        whole = blocks_for(len(request.prompt_ids) + len(request.emitted_ids), SIZE)
        if announced.final:
            assert len(blocks) == whole or (announced.final.finish_reason and not announced.blocks)
        assert len(blocks) <= whole

    @invariant()
    def pool_is_sound(self):
        self.node.pool.check()
        load = self.scheduler.load()
        assert load.running <= self.limits["max_sequences"]
        assert not self.scheduler.idle() or self.node.pool.counts().idle()

    @invariant()
    def readable_blocks_keep_their_content(self):
        for lease in self.announced:
            self.check_content(lease)

    def check_content(self, lease):
        request, blocks = self.leased[lease], self.announced[lease]
        tokens = [*request.prompt_ids, *request.emitted_ids][: len(blocks) * SIZE]
        assert [self.node.pool.generation(block) for block, _ in blocks] == [generation for _, generation in blocks]
        assert self.node.content([block for block, _ in blocks], len(tokens)) == tokens

    @invariant()
    def unaccepted_leases_are_few(self):
        """But for those that lost their reader."""
        started = {number for number in self.announced if number not in self.accepted | self.read}
        assert len(started) <= self.limits["max_unaccepted"]

    def teardown(self):
        if self.planned:
            self.apply()
        while self.pulls:
            self.close()
        for number in self.leased:
            self.accept(number)
        for _ in range(2 * len(self.requests) * 30):
            if self.scheduler.idle():
                break
            self.plan()
            self.apply()
            for number in [number for number in self.leased if number in self.computed]:
                self.release(number)
        assert self.scheduler.idle(), "a prompt waits for ever"
        assert self.node.pool.counts().idle()


TestPrefill = PrefillMachine.TestCase
TestPrefill.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
