"""Writes the model as `save_pretrained` would, and proves that transformers computes what was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from .model import DemoModel
from .tokenizer import END_OF_TEXT, TURN_END

LOGIT_TOLERANCE = 1e-3


def export(model: DemoModel, tokenizer: PreTrainedTokenizerFast, out: Path, card: Callable[[Path], str]) -> None:
    """Fills a folder beside `out`, checks it, has `card` describe it, then moves it over file by file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as name:
        folder = Path(name)
        _converted(model, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        verify(model, folder)
        (folder / "README.md").write_text(card(folder), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            file.replace(out / file.name)


def _converted(model: DemoModel, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    turn_end, end_of_text = (int(tokenizer.get_vocab()[token]) for token in (TURN_END, END_OF_TEXT))
    config = model.shape.config(eos_token_id=turn_end, pad_token_id=end_of_text)
    theirs = Qwen3MoeForCausalLM(config)
    weights = model.state_dict()
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    # A model this small repeats itself when greedy; clients that ask for no temperature get this one.
    theirs.generation_config = GenerationConfig(
        eos_token_id=[turn_end, end_of_text], pad_token_id=end_of_text, do_sample=True, temperature=0.6, top_p=0.9
    )
    return theirs.to(torch.bfloat16)


@torch.no_grad()
def verify(model: DemoModel, folder: Path) -> float:
    """The largest difference between our logits and transformers', both in float32 from the rounded weights."""
    ours = DemoModel(model.shape)
    ours.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items()})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(model.shape.vocab, (2, 48), generator=torch.Generator().manual_seed(0))
    expected: Tensor = theirs(tokens).logits
    worst = float((ours(tokens)[0] - expected).abs().max())
    if worst > LOGIT_TOLERANCE:
        raise ValueError(f"transformers' logits differ from the trained network's by {worst}")
    return worst
