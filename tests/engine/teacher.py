"""Teacher forcing: the logits of every position of a prompt, from Baton on one or several ranks (in threads) and from transformers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from baton.engine.batch import Batch, Int32, Row
from baton.engine.parallel import Groups, Rendezvous
from baton.engine.placement import Placement
from tests.engine.driving import BLOCK_SIZE, TIMEOUT_S, make_rank


@dataclass(frozen=True)
class Lesson:
    """A prompt, computed in chunks of these lengths. every: the logits of which tokens of a chunk are asked for, 0 for none."""

    prompt: tuple[int, ...]
    chunks: tuple[int, ...]
    every: int = 1

    def asked(self, length: int) -> Int32:
        """The rows of a chunk of this length."""
        return np.arange(0, length, self.every, dtype=np.int32) if self.every else np.zeros(0, np.int32)

    def batches(self) -> list[Batch]:
        """One per chunk."""
        stops = np.cumsum(self.chunks).tolist()
        rows = [
            Row(self.prompt[stop - length : stop], stop - length, range(-(-stop // BLOCK_SIZE)))
            for stop, length in zip(stops, self.chunks, strict=True)
        ]
        return [replace(Batch.build([row]), sample_rows=self.asked(len(row.token_ids))) for row in rows]


@dataclass(frozen=True)
class Taught:
    """What a lesson came to: logits [n, vocab] float32 of the leader, and the cache of every rank."""

    logits: torch.Tensor
    caches: tuple[bytes, ...]


def teach(model_dir: Path, lesson: Lesson, dtype: str = "auto", tp_size: int = 1) -> Taught:
    """Baton's."""
    if tp_size == 1:
        answers = [_recite(model_dir, lesson, dtype, Placement(), Groups.alone())]
    else:
        answers = _in_threads(model_dir, lesson, dtype, tp_size)
    logits, caches = zip(*answers, strict=True)
    assert all(part is None for part in logits[1:])
    return Taught(logits[0], caches)


def _in_threads(model_dir: Path, lesson: Lesson, dtype: str, tp_size: int) -> Sequence[tuple[torch.Tensor | None, bytes]]:
    meeting = Rendezvous("127.0.0.1", TIMEOUT_S)

    def play(rank: int) -> tuple[torch.Tensor | None, bytes]:
        placement = Placement.of(rank, tp_size)
        groups = Groups.connect(placement, "127.0.0.1", meeting.port, TIMEOUT_S)
        answer = _recite(model_dir, lesson, dtype, placement, groups)
        groups.close()
        return answer

    with ThreadPoolExecutor(tp_size) as threads:
        answers = list(threads.map(play, range(tp_size), timeout=TIMEOUT_S))
    meeting.close()
    return answers


def _recite(model_dir: Path, lesson: Lesson, dtype: str, placement: Placement, groups: Groups) -> tuple[torch.Tensor | None, bytes]:
    rank = make_rank(model_dir, placement, groups, dtype)
    logits = [rank.logits(batch) for batch in lesson.batches()]
    held = [part.contiguous().view(torch.uint8).numpy().tobytes() for layer in rank.kv.layers for part in layer.parts]
    return (torch.cat([torch.zeros(0), *(part for part in logits if part is not None)]) if placement.leader else None), b"".join(held)


def transformers_logits(model_dir: Path, prompt: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """[n, vocab] float32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0].float()
