"""Streamed text is the whole text, and stop strings are found as in the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.detokenizer import Detokenizer, Emitted, StopStrings
from tests.baton.conftest import MAKERS


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
def test_streamed_text_is_the_whole_text(loaded, kind, data):
    tokenizer = loaded[kind]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30)
    ids = data.draw(any_ids | st.text(max_size=12).map(tokenizer.encode))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=5).map(sorted))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip)
    parts = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    pieces = [detokenizer.push_one(part[0]) if len(part) == 1 else detokenizer.push(part) for part in parts]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip)


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_streamed_text_is_not_held_back_longer_than_a_character(loaded, text):
    tokenizer = loaded["byte level"]
    detokenizer, shown = Detokenizer(tokenizer), b""
    ids = tokenizer.encode(text)
    for position, token_id in enumerate(ids, start=1):
        shown += detokenizer.push([token_id]).encode()
        spelled = b"".join(tokenizer.token_bytes(i) for i in ids[:position])
        assert spelled.startswith(shown) and len(spelled) - len(shown) < 4


def test_an_id_without_a_token_does_not_end_a_run_of_bytes(loaded):
    tokenizer = loaded["byte fallback"]
    first, second = (tokenizer.encode("é", add_special_tokens=False))[-2:]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    assert detokenizer.push([first, tokenizer.vocab_size, second]) == ""
    assert detokenizer.flush() == tokenizer.decode([first, tokenizer.vocab_size, second], False) == "é"


def naive_first(pieces: list[str], stops: list[str], skip: int) -> tuple[str, int, str] | None:
    """Text before, pieces used up and the stop string, looking at every prefix of the text in turn."""
    head, text = "".join(pieces[:skip]), "".join(pieces[skip:])
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            used = next(count for count in range(len(pieces) + 1) if len("".join(pieces[:count])) >= len(head) + end)
            return head + text[: end - len(stop)], used, stop
    return None


LETTERS = st.text(alphabet="ab", max_size=4)


@given(
    pieces=st.lists(LETTERS, max_size=12),
    stops=st.lists(LETTERS.filter(bool), max_size=3),
    skip=st.integers(0, 3),
    size=st.integers(1, 4),
)
def test_stop_strings_are_found_as_in_the_whole_text(pieces, stops, skip, size):
    finder = StopStrings(stops, skip)
    shown, used, stop = "", 0, None
    for start in range(0, len(pieces), size):
        emitted = finder.push(pieces[start : start + size])
        shown, used, stop = shown + emitted.text, used + emitted.num_pieces, emitted.stop
        if stop:
            break
    expected = naive_first(pieces, stops, skip)
    if expected is None:
        assert (shown + finder.flush(), used, stop) == ("".join(pieces), len(pieces), None)
    else:
        assert (shown, used, stop) == expected
        assert finder.flush() == ""


def test_text_that_may_begin_a_stop_string_is_held_back():
    finder = StopStrings(["###", "\n\n"])
    assert finder.push(["a#", "#"]) == Emitted("a", 2)
    assert finder.push(["b\n"]) == Emitted("##b", 1)
    assert finder.push(["\nrest", "more"]) == Emitted("", 1, "\n\n")
