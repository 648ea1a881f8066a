"""A prompt of 100,000 tokens through the relay: the right tokens, in bounded memory, without a retry, and others are served meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from baton.client import Options
from cluster.offline import Engine
from tests.tiny_models import SHAPE, make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(600)]

NUM_TOKENS = 100_000
NUM_NEW = 6
BLOCK_SIZE = 16
GREEDY: Options = {"temperature": 0.0, "ignore_eos": True}
# Two layers and two heads: at this length nearly all time goes into attention, and the oracle needs as much.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
POOL_BYTES = 80 * 2**20
HEAD_BYTES = 2 * 2 * 16 * 4  # of one token and KV head: layers, K and V, dim, bytes
# What a process may need beside the prompt's KV. The scores of one head and one chunk alone would be 800 MB in one piece.
MAX_GROWTH_BYTES = 48 * 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with Llama 3.1's rope and its number of positions."""
    out = make_tiny("llama_tied", tmp_path_factory.mktemp("long"))
    torch.manual_seed(1)
    config = LlamaConfig(**{**SHAPE, **TINY}, tie_word_embeddings=True, rope_parameters=ROPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    """Prefill tp=2 with one head each; chunks of 2048 tokens."""
    settings = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_memory": POOL_BYTES, "prefill": {"tp": 2, "max_step_tokens": 2048}}
    with Engine(str(model), settings) as engine:
        yield engine


def continuation(model_dir: Path, prompt: list[int]) -> list[int]:
    """transformers' greedy continuation; fused attention, and logits of the last position alone, so that memory stays small."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    token_ids: list[int] = []
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        while len(token_ids) < NUM_NEW:
            token_ids.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([token_ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return token_ids


def peak_bytes(pid: int) -> int:
    """The most memory a process has had so far, what it shares with others included."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peaks(engine: Engine) -> dict[str, int]:
    return {"router": peak_bytes(engine.info.router_pid)} | {rank.name: peak_bytes(rank.pid) for rank in engine.info.ranks}


def kv_bytes(name: str) -> int:
    """The prompt's KV in a process: on prefill its heads; on decode all heads as its own, and the pools of both prefill ranks, which are
    mapped as a whole, ahead of what is read there."""
    of_prompt = NUM_TOKENS * HEAD_BYTES
    return {"router": 0, "prefill": of_prompt, "decode": 2 * of_prompt + 2 * POOL_BYTES}[name.split("-")[0]]


def serve_others(engine: Engine, long: Future[list[int]]) -> None:
    """Short requests come and go while the long prompt is being computed."""
    while not any(group["load"]["running_sequences"] for group in engine.status()["groups"] if group["role"] == "prefill"):
        time.sleep(0.05)
    for i in range(5):
        (answer,) = engine.generate([[40 + i] * 30], {**GREEDY, "max_tokens": 4})
        assert len(answer.token_ids) == 4
    assert not long.done()


def ask_over_http(engine: Engine, prompt: list[int]) -> list[int]:
    body = {"input_ids": prompt, "sampling_params": {**GREEDY, "max_new_tokens": NUM_NEW}}
    answer = httpx.post(f"http://{engine.info.http}/generate", json=body, timeout=500).raise_for_status().json()
    assert answer["meta_info"]["prompt_tokens"] == NUM_TOKENS
    token_ids: list[int] = answer["output_ids"]
    return token_ids


def test_a_hundred_thousand_tokens(engine: Engine, model: Path) -> None:
    drawn = random.Random(0)
    prompt = [drawn.randrange(4, 300) for _ in range(NUM_TOKENS)]
    before = peaks(engine)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask_over_http, engine, prompt)
        serve_others(engine, long)
    growth = {name: peak - before[name] - kv_bytes(name) for name, peak in peaks(engine).items()}
    assert all(grown < MAX_GROWTH_BYTES for grown in growth.values()), growth
    (again,) = engine.generate([prompt], {**GREEDY, "max_tokens": NUM_NEW})
    assert again.usage.cached_tokens == (NUM_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert long.result() == list(again.token_ids) == continuation(model, prompt)
    assert "baton_retries_total{" not in httpx.get(f"http://{engine.info.http}/metrics").text
    idle = engine.wait_idle()
    assert all(counts.idle() for counts in idle), idle
