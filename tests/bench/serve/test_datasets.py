"""Data sets: exact lengths by the tokenizer, shared prefixes where they are promised, the same requests for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from baton.tokenizer import Tokenizer
from bench.serve.datasets import Lengths, prefix_asks, random_asks
from bench.serve.recorded import TraceScale, mooncake_asks, sharegpt_asks
from bench.serve.vocabulary import Vocabulary


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", ["model_dir", "fallback_dir"])
@pytest.mark.parametrize(("input_len", "prefix_len", "ratio"), [(50, 0, 0.0), (3, 0, 0.0), (40, 24, 0.5), (300, 0, 0.0)])
def test_random_texts_have_exactly_the_tokens_asked_for(kind, input_len, prefix_len, ratio, request):
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    asks = random_asks(Vocabulary(tokenizer), 12, Lengths(input_len, 8, ratio), prefix_len, rng())
    assert [len(tokenizer.encode(ask.prompt)) for ask in asks] == [ask.prompt_len for ask in asks]
    assert all(round(input_len * (1 - ratio)) - 1 <= ask.prompt_len - prefix_len <= round(input_len * (1 + ratio)) + 1 for ask in asks)
    assert input_len < 40 or len({ask.prompt for ask in asks}) == 12
    if prefix_len:
        common = asks[0].prompt[: min(len(ask.prompt) for ask in asks)]
        assert all(ask.prompt.startswith(common[:prefix_len]) for ask in asks)


def test_the_same_seed_gives_the_same_requests(vocabulary):
    made = [random_asks(vocabulary, 5, Lengths(20, 8, 0.3, 0.3), 4, rng(seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    made = [prefix_asks(vocabulary, 6, 2, (8, 4, 3), rng(seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**31))
def test_as_ids_lengths_are_exact_and_nothing_is_special(vocabulary, input_len, prefix_len, seed):
    asks = random_asks(vocabulary, 4, Lengths(input_len, 8), prefix_len, rng(seed), as_ids=True)
    assert {len(ask.prompt) for ask in asks} == {prefix_len + input_len}
    assert {ask.prompt[:prefix_len] for ask in asks} == {asks[0].prompt[:prefix_len]}
    assert set(np.concatenate([ask.prompt for ask in asks]).tolist()) <= set(vocabulary.ids.tolist())


def test_prefixes_are_shared_evenly(vocabulary):
    asks = prefix_asks(vocabulary, 12, 3, (20, 7, 5), rng(), as_ids=True)
    prefixes = [ask.prompt[:20] for ask in asks]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert {(ask.prompt_len, ask.output_len) for ask in asks} == {(27, 5)}
    assert len({ask.prompt for ask in asks}) == 12


@pytest.mark.parametrize("num_prefixes", [0, 13])
def test_prefixes_that_cannot_be_shared_out(vocabulary, num_prefixes):
    with pytest.raises(ConfigError, match="num-prefixes"):
        prefix_asks(vocabulary, 12, num_prefixes, (20, 7, 5), rng())


TRACE = [
    {"timestamp": 27000, "input_length": 40, "output_length": 7, "hash_ids": [1, 2, 3]},
    {"timestamp": 27500, "input_length": 33, "output_length": 5, "hash_ids": [1, 2, 9]},
    {"timestamp": 30000, "input_length": 21, "output_length": 3, "hash_ids": [1]},
]


def trace(folder: Path, lines: list[object]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_trace_shares_what_its_hashes_share(vocabulary, tmp_path):
    asks = mooncake_asks(trace(tmp_path, TRACE), vocabulary, 10, TraceScale(slowdown=2.0, block_len=16), 0)
    assert [ask.at_s for ask in asks] == [0.0, 1.0, 6.0]
    assert [len(ask.prompt) for ask in asks] == [40, 33, 21] == [ask.prompt_len for ask in asks]
    first, second, third = (ask.prompt for ask in asks)
    assert first[:32] == second[:32] and first[32] != second[32] and first[:16] == third[:16] and first[16:21] != third[16:21]
    assert asks == mooncake_asks(trace(tmp_path, TRACE), vocabulary, 10, TraceScale(slowdown=2.0, block_len=16), 0)


def test_a_trace_of_shorter_requests_shares_as_much(vocabulary, tmp_path):
    asks = mooncake_asks(trace(tmp_path, TRACE), vocabulary, 2, TraceScale(length=0.5, block_len=16), 0)
    assert [(ask.prompt_len, ask.output_len) for ask in asks] == [(20, 4), (16, 2)]
    assert asks[0].prompt[:16] == asks[1].prompt


@pytest.mark.parametrize("lines", [[], [{"timestamp": 0}], [[1, 2]], [{**TRACE[0], "input_length": "many"}]])
def test_what_is_no_trace_is_named(vocabulary, tmp_path, lines):
    with pytest.raises(ConfigError, match=r"trace\.jsonl"):
        mooncake_asks(trace(tmp_path, lines), vocabulary, 10, TraceScale(), 0)


def conversation(*said: str) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": "human", "value": text} for text in said]}


def test_conversations_become_questions(model_dir, tmp_path):
    tokenizer = Tokenizer.load(model_dir)
    long = "a long question " * 400
    said = [conversation(f"question number {i} of a user", f"answer {i} " * (i + 1)) for i in range(6)]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([*said, conversation("alone"), conversation("x", "y"), conversation(long, "no"), {"id": 1}, 7]))
    asks = sharegpt_asks(path, tokenizer, 6, None, rng())
    assert {ask.prompt for ask in asks} == {f"question number {i} of a user" for i in range(6)}
    for ask in asks:
        number = int(ask.prompt.split()[2])
        assert ask.output_len == len(tokenizer.encode(f"answer {number} " * (number + 1)))
        assert ask.prompt_len == len(tokenizer.encode(ask.prompt))
    assert asks == sharegpt_asks(path, tokenizer, 6, None, rng()) != sharegpt_asks(path, tokenizer, 6, None, rng(1))
    assert {ask.output_len for ask in sharegpt_asks(path, tokenizer, 3, 2, rng())} == {2}
    assert len(sharegpt_asks(path, tokenizer, 20, None, rng())) == 20, "too few are asked again"


@pytest.mark.parametrize("content", ["{", "7", "[]", "[1, 2]"])
def test_what_is_no_conversation_is_named(model_dir, tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ConfigError, match=r"s\.json"):
        sharegpt_asks(tmp_path / "s.json", Tokenizer.load(model_dir), 3, None, rng())
