"""What disaggregation is for: streams that run while long prompts arrive. Knows our load generator; no server but its address.

One measurement: `num_streams` streams run; the gaps between their tokens are taken while all of them run, alone or with prompts of
2,000 tokens (one token of answer) arriving as a Poisson process. The rate is a share of what the same server computes beside the same
streams, measured just before: what it could sustain, not what it could do with nothing else to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton.deadline import Deadline
from baton.errors import DeadlineExceeded, InternalError
from baton.tokenizer import Tokenizer
from bench.serve.answers import Answer
from bench.serve.arrivals import arrivals
from bench.serve.asks import Ask
from bench.serve.backend import Target
from bench.serve.datasets import Lengths, random_asks
from bench.serve.load import Load
from bench.serve.openai import OpenAIBackend
from bench.serve.vocabulary import Vocabulary
from bench.suite.gaps import common_window, gaps_within, rate_of, summary

_REQUEST_S = 900.0
_BEGIN_S = 300.0
_POLL_S = 0.02
_STREAM_INPUT = 50
# Enough that one always waits while another is computed.
_SATURATING = 3


@dataclass(frozen=True, slots=True)
class Scene:
    """What runs and what disturbs it. share: of the prompts per second that the server computes beside the streams."""

    num_streams: int = 16
    stream_len: int = 800
    prompt_len: int = 2000
    share: float = 0.7
    most_prompts: int = 300


class Streams:
    """The experiment on one server. Owner of the connections, for as long as `measured` runs.

    seed: measurements with different ones have no prompts in common, so that no cache knows them. served_as: the model's name there,
    if it is not its path.
    """

    def __init__(self, url: str, model: Path, scene: Scene, seed: int, served_as: str = "") -> None:
        self._scene = scene
        self._target = Target(url, served_as or str(model), ignore_eos=True, timeout_s=_REQUEST_S, sampling={"temperature": 0.0})
        self._vocabulary = Vocabulary(Tokenizer.load(model))
        self._rng = np.random.default_rng(seed)

    def measured(self) -> dict[str, float]:
        """undisturbed_* and disturbed_*: gaps in ms; prompts per second that were possible beside the streams, and that came."""
        return asyncio.run(self._measured())

    async def _measured(self) -> dict[str, float]:
        backend = OpenAIBackend(self._target, "/v1/completions")
        scene = self._scene
        try:
            await self._run(backend, scene.stream_len // 8)  # warm up
            _, prompts = await self._run(backend, scene.stream_len // 2, limit=_SATURATING)
            capacity = rate_of([answer.end_s for answer in prompts if answer.succeeded])
            alone, _ = await self._run(backend, scene.stream_len)
            beside, prompts = await self._run(backend, scene.stream_len, rate=scene.share * capacity)
        finally:
            await backend.close()
        return {
            **{f"undisturbed_{key}": value for key, value in summary(alone).items()},
            **{f"disturbed_{key}": value for key, value in summary(beside).items()},
            "prompts_possible_per_s": capacity,
            "prompts_offered_per_s": scene.share * capacity,
            "num_prompts": float(sum(answer.succeeded for answer in prompts)),
        }

    async def _run(
        self, backend: OpenAIBackend, length: int, *, rate: float = float("inf"), limit: int = 0
    ) -> tuple[list[float], Sequence[Answer]]:
        """Streams of `length` tokens and, once all have begun, prompts: at a rate, or `limit` at a time, or none if neither is given.

        The gaps between tokens while all streams and the prompts ran, and the prompts' answers.
        """
        streams = self._load(backend, self._asks(_STREAM_INPUT, length, self._scene.num_streams), float("inf"), 0)
        disturbed = limit or rate != float("inf")
        prompts = self._load(backend, self._asks(self._scene.prompt_len, 1, self._scene.most_prompts if disturbed else 0), rate, limit)
        running = asyncio.create_task(streams.run())
        try:
            await _begun(streams)
            from_s = time.monotonic()
            disturbing = asyncio.create_task(prompts.run())
            answers = await running
        finally:  # both tasks end with this, whatever came between
            streams.stop()
            prompts.stop()
        came = await disturbing
        await _ended(prompts)
        times = [_times(answer) for answer in answers]
        start_s, end_s = common_window(times)
        return gaps_within(times, max(start_s, from_s), end_s), came

    def _asks(self, input_len: int, output_len: int, num: int) -> list[Ask]:
        return random_asks(self._vocabulary, num, Lengths(input_len, output_len), 0, self._rng, as_ids=True) if num else []

    def _load(self, backend: OpenAIBackend, asks: list[Ask], rate: float, limit: int) -> Load:
        at_s = arrivals(len(asks), rate, 1.0, self._rng) if asks else []
        return Load(backend, asks, at_s, limit or None, prefix=f"streams-{self._rng.integers(2**62):x}-")


async def _begun(streams: Load) -> None:
    """Until every stream has said something. Raises DeadlineExceeded."""
    deadline = Deadline.after(_BEGIN_S)
    while not streams.answers or not all(answer.token_s or answer.ended for answer in streams.answers):
        if deadline.passed():
            raise DeadlineExceeded(f"not all streams had begun after {_BEGIN_S:g} s", stage="bench")
        await asyncio.sleep(_POLL_S)


async def _ended(prompts: Load) -> None:
    """Until what was still running when the streams ended is over, so that it disturbs nothing after it. Raises DeadlineExceeded."""
    deadline = Deadline.after(_REQUEST_S)
    while prompts.num_running:
        if deadline.passed():
            raise DeadlineExceeded(f"prompts still run {_REQUEST_S:g} s after the streams have ended", stage="bench")
        await asyncio.sleep(_POLL_S)


def _times(answer: Answer) -> Sequence[float]:
    if not answer.succeeded:
        raise InternalError(f"a stream failed: {answer.error}", stage="bench")
    return answer.token_s
