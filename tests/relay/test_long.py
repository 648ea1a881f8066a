"""A prompt of 100,000 tokens through the relay: the right tokens, in bounded memory, and others are served meanwhile."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from baton.client import connect
from cluster.offline import Engine
from tests.tiny_models import SHAPE, make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(600)]

NUM_TOKENS = 100_000
NUM_NEW = 6
CHUNK = 2048
# Two layers and two heads: at this length nearly all time goes into attention, for the oracle as well.
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
# What a rank may need beyond its weights and KV blocks: the scores of one head of one chunk alone would be 800 MB in one piece.
MAX_GROWTH_BYTES = 64 * 2**20


def make_long(out: Path) -> Path:
    """A Llama with Llama 3.1's rope and its number of positions."""
    make_tiny("llama_tied", out)
    torch.manual_seed(1)
    config = LlamaConfig(**{**SHAPE, **TINY}, tie_word_embeddings=True, rope_parameters=ROPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    return out


def continuation(model_dir: Path, prompt: list[int], num_new: int) -> list[int]:
    """transformers' greedy continuation; fused attention and the last position's logits alone, so that memory stays small."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    token_ids: list[int] = []
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        for _ in range(num_new):
            token_ids.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([token_ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return token_ids


def peak_bytes(pid: int) -> int:
    """The most memory a process has had so far."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def test_a_hundred_thousand_tokens(tmp_path: Path) -> None:
    model_dir = make_long(tmp_path / "long")
    drawn = random.Random(0)
    prompt = [drawn.randrange(4, 300) for _ in range(NUM_TOKENS)]
    settings = {"dtype": "float32", "block_size": 16, "kv_memory": "80MiB", "prefill.max_step_tokens": CHUNK, "prefill.tp": 2}
    with Engine(str(model_dir), **settings) as engine:
        before = {rank.pid: peak_bytes(rank.pid) for rank in engine.counts()}
        t = time.monotonic()
        (answer,) = engine.generate([prompt], {"temperature": 0.0, "ignore_eos": True, "max_tokens": NUM_NEW, "logprobs": 0})
        print("took", time.monotonic() - t)
        for rank in engine.counts():
            print(rank.node, rank.rank, (peak_bytes(rank.pid) - before[rank.pid]) / 2**20, "MiB", rank.cpu_seconds)
        print(engine.status()["groups"][1]["pulls"])
    t = time.monotonic()
    expected = continuation(model_dir, prompt, NUM_NEW)
    print("oracle", time.monotonic() - t)
    assert list(answer.token_ids) == expected
