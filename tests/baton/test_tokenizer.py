"""Baton's tokenizer gives what transformers' gives, and reads a checkpoint's files as they are meant."""

import json

import pytest

from baton.errors import ConfigError, InvalidRequest
from baton.request import SamplingAsked
from baton.tokenizer import Tokenizer, unapplied_sampling
from tests.baton.conftest import MAKERS
from tests.tiny_tokenizers import make_byte_level

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


def test_the_template_hears_what_the_client_says_and_our_own_words_stay_ours(tmp_path):
    make_byte_level(tmp_path)
    template = "{% if enable_thinking is defined and not enable_thinking %}quiet{% else %}loud{% endif %} {{ messages | length }}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_text(MESSAGES) == "loud 4"
    assert tokenizer.chat_text(MESSAGES, values={"enable_thinking": False, "unknown": {"a": 1}, "not a name": 1}) == "quiet 4"
    with pytest.raises(InvalidRequest, match="may not set messages, tools"):
        tokenizer.chat_text(MESSAGES, values={"tools": [], "messages": []})


@pytest.mark.parametrize(
    ("generation", "found"),
    [
        (None, ()),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None}, ()),
        ({"do_sample": True, "repetition_penalty": 1.05, "max_new_tokens": 512}, ("repetition_penalty 1.05", "max_new_tokens 512")),
        ({"suppress_tokens": [1], "top_p": 0.8}, ("suppress_tokens [1]", "top_p 0.8 (do_sample is not true)")),
        ({"do_sample": False, "temperature": 1.0, "top_p": 1.0, "suppress_tokens": []}, ()),
    ],
)
def test_what_the_generation_config_asks_in_vain_is_named(tmp_path, generation, found):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert unapplied_sampling(tmp_path) == found


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


def test_tokens_spell_the_text(loaded):
    tokenizer = loaded["byte level"]
    ids = tokenizer.encode("naïve 🙂 <|im_end|>")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "naïve 🙂 <|im_end|>"
    assert any(tokenizer.token_text(i).startswith("bytes:\\x") for i in ids)
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_text(ids[0]) == "n"
    fallback = loaded["byte fallback"]
    assert b"".join(map(fallback.token_bytes, fallback.encode("a 🙂", add_special_tokens=False))).decode() == " a 🙂"
