"""Baton's tokenizer gives what transformers' gives; streamed text is the whole text; stop strings are found as in the whole text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError, InvalidRequest
from baton.request import SamplingAsked
from baton.tokenizer import Detokenizer, Emitted, StopStrings, Tokenizer
from tests.tiny_tokenizers import make_byte_fallback, make_byte_level

TEXTS = [
    "",
    "Hello, world",
    "  two  spaces\n\n",
    "naïve café 你好 🙂🙂",
    "<|im_start|>user\nx<|im_end|>",
    "</s> a<s>",
    "def f(x):\n\treturn x",
]
MESSAGES = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "héllo\n"},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "why?"},
]
MAKERS = {"byte level": make_byte_level, "byte fallback": make_byte_fallback}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp("tokenizer")) for kind, make in MAKERS.items()}


@pytest.fixture(scope="module")
def loaded(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(path) for kind, path in directories.items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_text_and_ids_are_those_of_transformers(directories, loaded, kind):
    from transformers import AutoTokenizer

    reference, tokenizer = AutoTokenizer.from_pretrained(directories[kind]), loaded[kind]
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert list(ids) == reference.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.special_ids == set(reference.all_special_ids) | ({1} if kind == "byte level" else {0})


@pytest.mark.parametrize("prompted", [True, False])
def test_chat_is_that_of_transformers(directories, loaded, prompted):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(directories["byte level"])
    for length in range(1, len(MESSAGES) + 1):
        messages = MESSAGES[:length]
        expected = reference.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
        assert list(loaded["byte level"].render_chat(messages, prompted)) == expected


def test_a_template_may_refuse(loaded):
    with pytest.raises(InvalidRequest, match="no tools here"):
        loaded["byte level"].render_chat([{"role": "tool", "content": "x"}])
    with pytest.raises(InvalidRequest, match="no chat template"):
        loaded["byte fallback"].render_chat(MESSAGES)
    with pytest.raises(InvalidRequest, match="at least one"):
        loaded["byte level"].render_chat([])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ strftime_now('%Y') | length }}{{ bos_token }}", "4"),
        ([{"name": "other", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ({"default": "{{ messages[0].reasoning_content }}"}, ""),
    ],
)
def test_a_template_may_come_from_the_config(tmp_path, source, text):
    make_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}), encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_text([{"role": "user", "content": "<é>"}]) == text


def test_a_template_runs_in_a_sandbox(tmp_path):
    make_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="unsafe"):
        Tokenizer.load(tmp_path).chat_text(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be compiled"):
        Tokenizer.load(tmp_path)


def test_eos_and_sampling_defaults_come_from_the_generation_config(tmp_path, loaded):
    tokenizer = loaded["byte level"]
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.sampling_defaults == SamplingAsked(temperature=0.7, top_k=20, top_p=0.8)
    assert loaded["byte fallback"].eos_ids == (2,)
    make_byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}', encoding="utf-8")
    assert Tokenizer.load(tmp_path).eos_ids == (0,)
    assert Tokenizer.load(tmp_path).sampling_defaults == SamplingAsked()
    (tmp_path / "config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_ids == (2,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing.*save_pretrained"),
        ("tokenizer.json", "{}", "cannot be read by tokenizers"),
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        ("config.json", "[]", "must hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
    ],
)
def test_a_broken_checkpoint_is_named(tmp_path, name, content, message):
    make_byte_level(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
def test_streamed_text_is_the_whole_text(loaded, kind, data):
    tokenizer = loaded[kind]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30)
    ids = data.draw(any_ids | st.text(max_size=12).map(tokenizer.encode))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=5).map(sorted))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(ids[start:end]) for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
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


def test_tokens_spell_the_text(loaded):
    tokenizer = loaded["byte level"]
    ids = tokenizer.encode("naïve 🙂 <|im_end|>")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "naïve 🙂 <|im_end|>"
    assert any(tokenizer.token_text(i).startswith("bytes:\\x") for i in ids)
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_text(ids[0]) == "n"
    fallback = loaded["byte fallback"]
    assert b"".join(map(fallback.token_bytes, fallback.encode("a 🙂", add_special_tokens=False))).decode() == " a 🙂"


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
