"""Answers of /generate as SGLang writes them: text and output_ids grow from event to event. Pure: chunks in, JSON out."""

from __future__ import annotations

from collections.abc import Iterator

from baton.deadline import now_s
from baton.request import Chunk, FinishReason, Usage
from router.schema_native import NativeBody
from router.web_answers import Collected, Frame, Json, event, finite


class NativeAnswer:
    """The answer to one NativeBody: an object, or a list of them where several prompts or answers were asked for."""

    def __init__(self, frame: Frame, body: NativeBody) -> None:
        self._frame = frame
        self._body = body
        self._started_s = now_s()
        self._choices = [[Collected() for _ in range(sampling.n)] for sampling in body.samplings]
        self._usages = [Usage(prompt_tokens=len(ids)) for ids in frame.prompt_ids] or [Usage()] * len(body.samplings)

    def take(self, prompt: int, chunk: Chunk) -> None:
        """Remember a chunk."""
        self._choices[prompt][chunk.choice].add(chunk)
        if chunk.usage is not None:
            self._usages[prompt] = chunk.usage

    def whole(self) -> Json | list[Json]:
        """The body of an answer that is not streamed."""
        answers = [self._answer(prompt, choice) for prompt, choices in enumerate(self._choices) for choice in choices]
        return answers if self._is_list else answers[0]

    def events(self, prompt: int, chunk: Chunk) -> bytes:
        """One event per chunk, with everything of its choice so far."""
        self.take(prompt, chunk)
        index = sum(len(choices) for choices in self._choices[:prompt]) + chunk.choice
        return event(self._answer(prompt, self._choices[prompt][chunk.choice]) | ({"index": index} if self._is_list else {}))

    def closing(self) -> Iterator[Json]:
        """Nothing: each choice's last event says it all."""
        yield from ()

    @property
    def _is_list(self) -> bool:
        return self._body.prompts.is_list or any(len(choices) > 1 for choices in self._choices)

    def _answer(self, prompt: int, choice: Collected) -> Json:
        meta = {
            "id": self._frame.id,
            "finish_reason": _finish(choice),
            "prompt_tokens": self._usages[prompt].prompt_tokens,
            "completion_tokens": len(choice.token_ids),
            "cached_tokens": self._usages[prompt].cached_tokens,
            "e2e_latency": now_s() - self._started_s,
        }
        meta |= self._logprobs(choice) if self._body.return_logprob else {}
        return {"text": choice.text, "output_ids": list(choice.token_ids), "meta_info": meta}

    def _logprobs(self, choice: Collected) -> Json:
        items = choice.logprobs
        content: Json = {
            "input_token_logprobs": [],
            "output_token_logprobs": [self._logprob(item.token_id, item.logprob) for item in items],
        }
        if self._body.top_logprobs_num:
            content["input_top_logprobs"] = []
            content["output_top_logprobs"] = [[self._logprob(*pair) for pair in item.top] for item in items]
        return content

    def _logprob(self, token_id: int, logprob: float) -> list[float | int | str | None]:
        text = self._frame.tokenizer.token_text(token_id) if self._body.return_text_in_logprobs else None
        return [finite(logprob), token_id, text]


def _finish(choice: Collected) -> Json | None:
    if choice.finish_reason is FinishReason.STOP:
        return {"type": "stop", "matched": choice.stopped_by}
    if choice.finish_reason is FinishReason.LENGTH:
        return {"type": "length", "length": len(choice.token_ids)}
    return None
