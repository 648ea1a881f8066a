"""Short prompts that a decode node computes itself while the prefill node is behind: the tokens are the same, wherever they come from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.client import connect
from cluster.offline import Engine
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

NUM_PROMPTS = 32
PROMPTS = [[2 + (7 * number + 3 * i) % 90 for i in range(100)] for number in range(NUM_PROMPTS)]


def test_a_burst_is_computed_on_both_sides_and_equals_transformers(tmp_path: Path) -> None:
    model = make_tiny("qwen3", tmp_path)
    settings = {"dtype": "float32", "kv_memory": "16MiB", "max_model_len": 512, "prefill.max_step_tokens": 32}
    with Engine(str(model), settings) as engine, connect(engine.info.grpc) as client:

        def answer(prompt: list[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
            (completion,) = client.complete(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
            return completion.token_ids, completion.served_by

        with ThreadPoolExecutor(NUM_PROMPTS) as threads:
            answers = list(threads.map(answer, PROMPTS))
        counts = engine.wait_idle()
    oracle = Oracle(model)
    assert [list(token_ids) for token_ids, _ in answers] == [oracle.greedy(prompt, 8).token_ids for prompt in PROMPTS]
    assert {served_by[0] for _, served_by in answers} == {"prefill-0", "decode-0/0"}
    assert all(rank.idle() for rank in counts), counts
