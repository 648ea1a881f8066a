"""Baton's own gRPC, through baton/client.py: one channel, one task per request. Knows chunks; no HTTP."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import cast

from baton.client import Client, Options, PromptLike, make_request
from baton.errors import BatonError
from bench.serve.answers import Answer, Done
from bench.serve.asks import Ask
from bench.serve.backend import Target

Prepared = tuple[PromptLike, Options]


class NativeBackend:
    """One router. Owner of the channel and of the tasks that read answers. Raises ConfigError for sampling it does not know."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client = Client(target.url, target.api_key or None)
        self._reading: set[asyncio.Task[None]] = set()

    def prepare(self, ask: Ask, request_id: str) -> Prepared:
        """Prompt and options of the client's `generate`. Raises InvalidRequest for an option the client does not know."""
        own: Options = {
            "max_tokens": ask.output_len,
            "ignore_eos": self._target.ignore_eos,
            "request_id": request_id,
            "model": self._target.model,
        }
        options = cast(Options, {**self._target.sampling, **own})
        make_request(ask.prompt, options)
        return ask.prompt, options

    def send(self, prepared: Prepared, answer: Answer, done: Done) -> None:
        """In a task of its own."""
        task = asyncio.create_task(self._read(*prepared, answer, done))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, prompt: PromptLike, options: Options, answer: Answer, done: Done) -> None:
        answer.sent_s = time.monotonic()
        error = ""
        try:
            # Here and not as the request's own deadline: the server has a longest one, and this is only for what never ends.
            async with asyncio.timeout(self._target.timeout_s), aclosing(self._client.generate(prompt, **options)) as chunks:
                async for chunk in chunks:
                    if chunk.token_ids:
                        answer.token_s.append(time.monotonic())
                        if self._target.with_text:
                            answer.texts.append(chunk.text)
                    if chunk.usage is not None:
                        answer.prompt_len, answer.output_len = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        except BatonError as failed:
            error = f"{failed.status}: {failed.message}"
        except TimeoutError:
            error = "no end of the answer in time"
        answer.end(time.monotonic(), error)
        done(answer)

    async def models(self) -> list[str]:
        """The Models call."""
        return [model.name for model in await self._client.models()]

    async def close(self) -> None:
        """End everything."""
        for task in tuple(self._reading):
            task.cancel()
        await self._client.close()
