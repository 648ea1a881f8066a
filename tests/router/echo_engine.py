"""A small real `Generates`: answers with the prompt's own tokens, one step at a time, through the real tokenizer.

Deterministic, without nodes: the HTTP front is tested and measured over it. Prompts listed in `faults` fail after some steps;
the prompt `forever` never gets its third token, so its request lasts until somebody closes it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from baton.detokenizer import Detokenizer, StopStrings
from baton.errors import BatonError, NotFound
from baton.request import Chunk, FinishReason, GenerateRequest, TokenLogprob, Usage
from baton.telemetry import RouterMetrics
from baton.tokenizer import Tokenizer
from router.admission import Limits, check_request
from router.flush import Flushed
from router.schema import ModelCard
from router.sink import Sink

MAX_MODEL_LEN = 512


class EchoEngine:
    """ended: request ids with how they ended, in that order. is_ready: what `ready` says."""

    def __init__(self, tokenizer: Tokenizer, faults: Mapping[str, tuple[int, BatonError]]) -> None:
        self.tokenizer = tokenizer
        self.is_ready = True
        self.requests: list[GenerateRequest] = []
        self.ended: list[tuple[str, str]] = []
        self._changed = asyncio.Event()
        self._faults = faults
        self._metrics = RouterMetrics()

    def check(self, request: GenerateRequest) -> None:
        """By the router's own rules, with the limits of this engine."""
        check_request(request, Limits(MAX_MODEL_LEN, self.tokenizer.vocab_size))

    async def answer(self, request: GenerateRequest, sink: Sink) -> None:
        """Every choice repeats the prompt's ids, again and again, until max_tokens, a stop id or a stop string."""
        self.requests.append(request)
        self._changed.set()
        outcome = "cancelled"
        try:
            async with aclosing(self._steps(request, self._prompt_ids(request))) as chunks:
                async for chunk in chunks:
                    if not sink.put(chunk):
                        await sink.room()
            outcome = "finished"
        except BatonError as error:
            outcome = error.cause
            raise
        finally:
            self.ended.append((request.request_id, outcome))
            self._changed.set()

    async def until(self, num_requests: int, num_ended: int) -> None:
        """Wait until so many requests have come, and so many of them have ended."""
        while len(self.requests) < num_requests or len(self.ended) < num_ended:
            self._changed.clear()
            await self._changed.wait()

    async def flush_cache(self, node: str = "") -> Flushed:
        """Blocks of nodes that are not there."""
        if node not in ("", "prefill-0"):
            raise NotFound(f"there is no node {node!r}; known are prefill-0", stage="router")
        return Flushed(1, 7)

    def ready(self) -> bool:
        """As told."""
        return self.is_ready

    def status(self) -> dict[str, object]:
        """A pair of nodes that are not there."""
        pair = {"prefill": "prefill-0", "decode": "decode-0", "proven": self.is_ready, "refusal": ""}
        return {"pairs": [pair], "summary": f"{int(self.is_ready)} of 1 pairs are proven and usable"}

    def metrics(self) -> bytes:
        """The router's metrics, all zero."""
        return self._metrics.render()

    def model_card(self) -> ModelCard:
        """A card."""
        return ModelCard("echo", MAX_MODEL_LEN, 1_700_000_000)

    def _prompt_ids(self, request: GenerateRequest) -> tuple[int, ...]:
        prompt = request.prompt
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.messages is not None:
            return self.tokenizer.render_chat(prompt.messages, prompt.add_generation_prompt, prompt.template_values)
        return self.tokenizer.encode(prompt.text or "")

    async def _steps(self, request: GenerateRequest, ids: tuple[int, ...]) -> AsyncGenerator[Chunk, None]:
        voices = [_Voice(self.tokenizer, request, ids, choice) for choice in range(request.n)]
        fails_at, error = self._faults.get(request.prompt.text or "", (-1, BatonError("")))
        step, speaking = 0, list(voices)
        while speaking:
            if step == fails_at:
                raise error
            if step == 2 and request.prompt.text == "forever":
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            chunks = [voice.speak() for voice in speaking]
            speaking = [voice for voice, chunk in zip(speaking, chunks, strict=True) if chunk.finish_reason is None]
            if not speaking:
                usage = Usage(len(ids), sum(voice.count for voice in voices), cached_tokens=1)
                chunks[-1] = chunks[-1]._replace(usage=usage)
            for chunk in chunks:
                yield chunk
            step += 1


class _Voice:
    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest, ids: tuple[int, ...], choice: int) -> None:
        asked = request.sampling
        self.count = 0
        self.reason: FinishReason | None = None
        self.stopped_by: int | str | None = None
        self._request, self._ids, self._choice = request, ids, choice
        self._max = asked.max_tokens or request.default_max_tokens or MAX_MODEL_LEN - len(ids)
        self._ends = asked.stop_token_ids + (() if asked.ignore_eos else tokenizer.eos_ids)
        self._detokenizer = Detokenizer(tokenizer, asked.skip_special_tokens)
        self._stops = StopStrings(asked.stop, asked.min_tokens or 0)

    def speak(self) -> Chunk:
        token_id = self._ids[self.count % len(self._ids)]
        self.count += 1
        ended = token_id in self._ends
        emitted = self._stops.push(["" if ended else self._detokenizer.push([token_id])])
        text = (self._request.prompt.text or "") + emitted.text if self._request.echo and self.count == 1 else emitted.text
        self.stopped_by = token_id if ended else emitted.stop
        if self.stopped_by is not None:
            self.reason = FinishReason.STOP
        elif self.count == self._max:
            self.reason = FinishReason.LENGTH
        if self.reason and emitted.stop is None:
            text += self._stops.push([self._detokenizer.flush()]).text + self._stops.flush()
        return Chunk(
            self._request.request_id,
            self._choice,
            text,
            (token_id,),
            self._logprobs(token_id),
            finish_reason=self.reason,
            stopped_by=self.stopped_by,
        )

    def _logprobs(self, token_id: int) -> tuple[TokenLogprob, ...]:
        asked = self._request.sampling.logprobs
        if asked is None:
            return ()
        top = ((token_id, -0.25), *((other, -1.0 - other) for other in range(5, 4 + asked)))
        return (TokenLogprob(token_id, -0.25, top[:asked]),)
