"""What transformers says: the oracle of every golden test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton.client import Options
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
        self._known_logits: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> Expected:
        """`max_tokens` tokens, end-of-sequence ignored. Asked again (by the next shape), it answers from memory."""
        key = (tuple(prompt_ids), max_tokens)
        if key not in self._known:
            self._known[key] = self._generate(prompt_ids, max_tokens)
        return self._known[key]

    def follows(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Expected:
        """Greedy continuation again, found in one pass: what is most likely after the prompt and each part of an answer.

        An answer that equals it token for token equals, from the first token on, what greedy decoding would have said.
        """
        logits = self._logits(prompt_ids, token_ids)
        best = logits.argmax(dim=-1)
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, best.unsqueeze(1)).squeeze(1)
        return Expected(best.tolist(), logprobs.tolist())

    def draws(self, prompt_ids: Sequence[int], token_ids: Sequence[int], sampling: Options) -> list[int]:
        """The same for a seeded answer: what Baton's rule (design rule 6) draws from transformers' distributions."""
        how = [_sample_row(index, sampling) for index in range(len(token_ids))]
        batch = Batch.build([Row([0], 0, [0], row) for row in how])
        return [int(token) for token in sample(self._logits(prompt_ids, token_ids), batch).token_ids]

    def _logits(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), vocabulary] fp32, from one pass; remembered, since the next shape says the same."""
        key = (tuple(prompt_ids), tuple(token_ids))
        if key not in self._known_logits:
            with torch.inference_mode():
                logits = self._model(torch.tensor([[*prompt_ids, *token_ids[:-1]]])).logits
            self._known_logits[key] = logits[0, len(prompt_ids) - 1 :].float()
        return self._known_logits[key]

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


def _sample_row(index: int, sampling: Options) -> SampleRow:
    return SampleRow(
        seed=sampling["seed"],
        output_index=index,
        temperature=sampling["temperature"],
        top_k=sampling["top_k"],
        top_p=sampling["top_p"],
        min_p=sampling["min_p"],
    )
