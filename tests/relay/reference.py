"""What transformers says: the oracle of every golden test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.sampler import sample


@dataclass(frozen=True, slots=True)
class Expected:
    """Greedy continuation of one prompt and the log-probability of each of its tokens."""

    token_ids: list[int]
    logprobs: list[float]


class Oracle:
    """A checkpoint run by transformers in fp32, one prompt at a time."""

    def __init__(self, model_dir: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self._model: PreTrainedModel = model.eval()
        self._known: dict[tuple[tuple[int, ...], int], Expected] = {}
        self._known_seeded: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> Expected:
        """`max_tokens` tokens, end-of-sequence ignored. Asked again (by the next shape), it answers from memory."""
        key = (tuple(prompt_ids), max_tokens)
        if key not in self._known:
            self._known[key] = self._generate(prompt_ids, max_tokens)
        return self._known[key]

    def seeded(self, prompt_ids: Sequence[int], sampling: Mapping[str, float]) -> list[int]:
        """What Baton's rule (design rule 6) draws from transformers' distributions; always with the same `sampling`."""
        key = tuple(prompt_ids)
        if key not in self._known_seeded:
            self._known_seeded[key] = self._draw(prompt_ids, sampling)
        return self._known_seeded[key]

    def _draw(self, prompt_ids: Sequence[int], sampling: Mapping[str, float]) -> list[int]:
        token_ids: list[int] = []
        for index in range(int(sampling["max_tokens"])):
            with torch.inference_mode():
                logits = self._model(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, -1:].float()
            how = SampleRow(
                seed=int(sampling["seed"]),
                output_index=index,
                temperature=sampling["temperature"],
                top_k=int(sampling["top_k"]),
                top_p=sampling["top_p"],
                min_p=sampling["min_p"],
            )
            token_ids.append(int(sample(logits, Batch.build([Row([0], 0, [0], how)])).token_ids[0]))
        return token_ids

    def _generate(self, prompt_ids: Sequence[int], max_tokens: int) -> Expected:
        prompt = torch.tensor([list(prompt_ids)])
        with torch.inference_mode():
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=max_tokens,
                max_new_tokens=max_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            token_ids = output[0, len(prompt_ids) :].tolist()
            rows = torch.log_softmax(self._model(output).logits[0, len(prompt_ids) - 1 : -1].float(), dim=-1)
        return Expected(token_ids, [float(row[token]) for row, token in zip(rows, token_ids, strict=True)])
