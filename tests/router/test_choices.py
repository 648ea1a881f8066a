"""Deliveries as chunks: text, stop strings across tokens, what is counted and what is shown; deliveries of any size give the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.request import FinishReason, Sampling, TokenLogprob, Usage
from baton.tokenizer import Tokenizer
from router.choices import Choice, Prepared, total_usage, whole
from router.life import Delivery


def prepared(max_tokens: int, *, stop: tuple[str, ...] = (), min_tokens: int = 0, echo: str = "") -> Prepared:
    sampling = Sampling(max_tokens=max_tokens, min_tokens=min_tokens, seed=7)
    return Prepared("r", (1, 2, 3), (sampling,), stop=stop, echo_text=echo)


def delivery(first: int, ids: tuple[int, ...], reason: FinishReason | None = None) -> Delivery:
    return Delivery(first, ids, tuple(TokenLogprob(i, -1.0) for i in ids), reason)


@given(text=st.text(alphabet="ab€", min_size=1, max_size=20), stop=st.text(alphabet="ab€", min_size=1, max_size=4), data=st.data())
def test_a_stop_string_is_found_wherever_deliveries_are_cut(tokenizer: Tokenizer, text: str, stop: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    choice = Choice(prepared(len(ids), stop=(stop,)), 0, tokenizer)
    chunks, at = [], 0
    while at < len(ids) and choice.finish_reason is None:
        size = data.draw(st.integers(1, len(ids) - at))
        last = at + size == len(ids)
        chunks.append(choice.take(delivery(at, ids[at : at + size], FinishReason.LENGTH if last else None)))
        at += size
    answer = whole(chunks)
    where = text.find(stop)
    assert answer.text == (text if where < 0 else text[:where])
    assert answer.finish_reason is (FinishReason.LENGTH if where < 0 else FinishReason.STOP)
    counted = ids if where < 0 else tokenizer.encode(text[: where + len(stop)])
    assert answer.token_ids == counted
    assert tuple(item.token_id for item in answer.logprobs) == counted
    assert choice.num_tokens == len(counted)


@given(text=st.text(alphabet="ab€🙂", min_size=1, max_size=12), data=st.data())
def test_without_stop_strings_text_is_the_tokens_however_deliveries_are_cut(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    choice = Choice(prepared(len(ids), echo=">"), 0, tokenizer)
    chunks, at = [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, min(2, len(ids) - at)))
        chunks.append(choice.take(delivery(at, ids[at : at + size], FinishReason.LENGTH if at + size == len(ids) else None)))
        at += size
    answer = whole(chunks)
    assert (answer.text, answer.token_ids, choice.num_tokens) == (">" + text, ids, len(ids))
    assert tuple(item.token_id for item in answer.logprobs) == ids
    assert [chunk.seed for chunk in chunks] == [7] + [None] * (len(chunks) - 1)


def test_half_a_character_at_the_end_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a€")[:-1]
    choice = Choice(prepared(len(ids)), 0, tokenizer)
    assert choice.take(delivery(0, ids[:2])).text == "a"
    assert choice.take(delivery(2, ids[2:], FinishReason.LENGTH)).text == "\ufffd"


def test_text_that_might_be_a_stop_string_comes_at_the_end_after_all(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc")
    choice = Choice(prepared(3, stop=("cd",)), 0, tokenizer)
    assert choice.take(delivery(0, ids[:2])).text == "ab"
    assert choice.take(delivery(2, ids[2:], FinishReason.LENGTH)).text == "c"


def test_the_first_chunk_has_the_seed_and_the_echo(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xy")
    choice = Choice(prepared(2, echo="prompt "), 0, tokenizer)
    first, second = choice.take(delivery(0, ids[:1])), choice.take(delivery(1, ids[1:], FinishReason.LENGTH))
    assert (first.text, first.seed) == ("prompt x", 7)
    assert (second.text, second.seed) == ("y", None)


def test_a_late_finish_without_tokens_ends_the_choice(tokenizer: Tokenizer) -> None:
    choice = Choice(prepared(5), 0, tokenizer)
    choice.take(delivery(0, tokenizer.encode("a")))
    last = choice.take(delivery(1, (), FinishReason.STOP))
    assert (last.token_ids, last.finish_reason, last.stopped_by) == ((), FinishReason.STOP, None)


def test_usage_counts_the_prompt_once_and_the_least_cached(tokenizer: Tokenizer) -> None:
    choices = [Choice(prepared(5), 0, tokenizer) for _ in range(2)]
    for choice in choices:
        choice.take(delivery(0, tokenizer.encode("abc")))
    assert total_usage(prepared(5), choices, [None, None]) == Usage(3, 6, 0)
    assert total_usage(prepared(5), choices, [32, 16]) == Usage(3, 6, 16)
