"""What transformers makes of the same prompts, in the same dtype."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.engine.driving import Ask, Tokens


def expected(model_dir: Path, wanted: Sequence[Ask], dtype: torch.dtype = torch.float32) -> list[Tokens]:
    """What transformers generates."""
    return [list(_generated(model_dir, ask, dtype)) for ask in wanted]


@lru_cache
def _generated(model_dir: Path, ask: Ask, dtype: torch.dtype) -> Sequence[tuple[int, float]]:
    """Made once for all layouts that are held against it: a checkpoint must not change after it was asked for."""
    return tuple(_generate(_model(model_dir, dtype), ask))


@lru_cache(2)
def _model(model_dir: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation="eager").eval()


def _generate(model: Any, ask: Ask) -> Tokens:
    prompt = torch.tensor([ask.prompt])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=ask.num_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(ask.prompt) :].tolist()
    return [(token, float(logits[0].float().log_softmax(-1)[token])) for token, logits in zip(tokens, out.logits, strict=True)]


def assert_equal(got: Sequence[Tokens], want: Sequence[Tokens]) -> None:
    """The same tokens, and logprobs within 1e-4."""
    assert [[token for token, _ in tokens] for tokens in got] == [[token for token, _ in tokens] for tokens in want]
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose([p for _, p in mine], [p for _, p in theirs], atol=1e-4, rtol=0)
