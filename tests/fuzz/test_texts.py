"""What is read from a pipe or a file: the keeper's lines, the configuration, a client's JSON. Understood, or refused by our own word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from baton.config import BatonConfig, load_config
from baton.errors import BatonError, ConfigError, InvalidRequest, NodeLost
from cluster.messages import EVENT, Facts, Launch, Lost, Question, Ready, Reply
from router.schema_json import MAX_DEPTH, read_json
from tests.fuzz.hostile import effort, noise

LINES: list[BaseModel] = [
    Reply(number=3, answer=[{"node": "decode-0"}]),
    Reply(number=3, error=Facts.of(NodeLost("gone", node="decode-0"))),
    Lost(name="decode-0/1", pid=4, reason="it ended"),
    Question(number=1, question="status"),
    Launch(config=BatonConfig(model="m"), home="h", private=True),
]
YAML = """\
model: demo/model
router:
  http_port: 0
  max_body_bytes: 8MiB
kv_memory: 64MiB
prefill: {nodes: 2, tp: 1}
ray: {prefill_label: {a: b}}
"""
# Where YAML surprises: dates, numbers that are none, references to themselves, more of them than can be written out, tags, depth.
SNIPPETS = [
    *(
        "0000-00-00",
        "2001-99-99 1:2",
        "0x_",
        "1:99:99",
        "&a [*a]",
        "{[1]: 2}",
        "!!python/object:os.system x",
        "!!binary 'ä'",
        "? a",
        "<<: 3",
    ),
    *(
        "&a {<<: *a}",
        "- [" * 400,
        "{" * 400,
        "\x00",
        "\ufeff",
        "'\\ud800'",
        '"\\ud800"',
        "!!int x",
        "1e999",
        ".nan",
        "*nobody",
        "%YAML 9.9",
        "---\n---",
    ),
    "&a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
    "e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f,*f]",
]


@effort(40)
@given(data=st.data())
def test_a_line_of_the_keepers_pipe_is_a_message_or_none(data: st.DataObject) -> None:
    line = data.draw(st.sampled_from(LINES).flatmap(lambda message: noise(message.model_dump_json().encode())))
    for parse in (EVENT.validate_json, Question.model_validate_json, Launch.model_validate_json):
        try:
            found: Any = parse(line)
        except ValidationError:
            continue
        assert type(found) in (*map(type, LINES), Ready) or found.event
    with pytest.raises(BatonError):
        raise Facts(kind=data.draw(st.text(max_size=20)), message="x").error()


@st.composite
def settings_files(draw: st.DrawFn) -> bytes:
    """A configuration in which something is not as it should be."""
    lines = YAML.splitlines()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines)))
        name = draw(st.sampled_from(["model", "router", "kv_memory", "membership", "prefill", "x", "1", "null", "? "]))
        lines.insert(at, f"{name}: {draw(st.sampled_from(SNIPPETS) | st.text(max_size=10))}")
    raw = "\n".join(lines).encode(errors="replace")
    return draw(st.just(raw) | noise(raw) | st.sampled_from(SNIPPETS).map(lambda text: text.encode(errors="replace")))


@effort(50)
@given(raw=settings_files())
def test_a_configuration_is_one_or_is_refused_in_few_words(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "baton.yaml"
    path.write_bytes(raw)
    try:
        assert isinstance(load_config(path), BatonConfig)
    except ConfigError as refused:
        assert len(refused.message) < 20_000


@effort(40)
@given(
    content=st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    )
)
def test_a_setting_may_have_any_value_and_is_judged(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(
        yaml.safe_dump({"model": "m", "router": content, "membership": {"beat_s": content}, "kv_memory": content}, allow_unicode=True)
    )
    try:
        assert isinstance(load_config(path), BatonConfig)
    except ConfigError as refused:
        assert any(f"\n  {name}" in refused.message for name in ("router", "membership", "kv_memory"))


@effort(40)
@given(data=st.data())
def test_a_body_is_an_object_of_text_and_numbers_or_is_refused(data: st.DataObject) -> None:
    values = st.recursive(
        st.none() | st.floats() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
    content = data.draw(st.dictionaries(st.text(), values, max_size=3))
    for _ in range(data.draw(st.sampled_from([0, 0, MAX_DEPTH - 5, MAX_DEPTH + 5, 2000]))):
        content = {"a": content}
    raw = _dumped(content)
    try:
        found = read_json(data.draw(st.just(raw) | noise(raw)))
    except InvalidRequest as refused:
        assert len(refused.message) < 500
    else:
        assert json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


def _dumped(content: Any) -> bytes:
    """As JSON; what is too deep for the library, from the inside out."""
    layers = 0
    while list(content) == ["a"] and isinstance(content["a"], dict):
        content, layers = content["a"], layers + 1
    return b'{"a":' * layers + json.dumps(content).encode() + b"}" * layers
