"""`python -m bench.suite.generate MODEL`: transformers' own generate, batch by batch, as its users do. Prints one line of JSON.

A process of its own: what it leaves in memory and threads must not be there when Baton is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from baton.tokenizer import Tokenizer
from bench.serve.asks import Ask
from bench.serve.datasets import Lengths, random_asks
from bench.serve.vocabulary import Vocabulary


def main(argv: Sequence[str] | None = None) -> int:
    """Generate all batches; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--input-len", type=int, default=50, metavar="N")
    parser.add_argument("--output-len", type=int, default=50, metavar="N")
    parser.add_argument("--num-prompts", type=int, default=256, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(argv)
    asks = random_asks(
        Vocabulary(Tokenizer.load(options.model)),
        options.num_prompts,
        Lengths(options.input_len, options.output_len),
        0,
        np.random.default_rng(options.seed),
        as_ids=True,
    )
    print(json.dumps(generated(options.model, asks, options.batch, options.output_len)))
    return 0


def generated(model_dir: Path, asks: Sequence[Ask], batch: int, output_len: int) -> dict[str, float]:
    """{output_throughput, duration} of greedy bf16 on all cores, after a warm-up of the first batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    batches = [torch.tensor([ask.prompt for ask in asks[start : start + batch]]) for start in range(0, len(asks), batch)]

    def run(ids: torch.Tensor, length: int) -> int:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length, do_sample=False)
        assert out.shape[1] == ids.shape[1] + length
        return int(ids.shape[0]) * length

    run(batches[0], min(4, output_len))
    began_s = time.perf_counter()
    num_tokens = sum(run(ids, output_len) for ids in batches)
    took_s = time.perf_counter() - began_s
    return {"output_throughput": num_tokens / took_s, "duration": took_s}


if __name__ == "__main__":
    raise SystemExit(main())
