"""Answers of /v1/completions and /v1/chat/completions as OpenAI writes them, with vLLM's extensions. Pure: chunks in, JSON out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from baton.request import Chunk, TokenLogprob
from baton.tokenizer import Tokenizer
from router.schema import ChatBody, CompletionBody, OpenAIBody, StreamOptions
from router.web_answers import Collected, Collection, Frame, Json, TextEvents, event, finite, usage_json


class CompletionAnswer:
    """The answer to one CompletionBody."""

    def __init__(self, frame: Frame, body: CompletionBody) -> None:
        self._frame = frame
        self._body = body
        self._collection = Collection(len(body.prompt.items), body.n, frame.prompt_ids)
        self._offsets = [0] * len(self._collection.choices)
        self._only_text = not (body.return_token_ids or body.stream_options.continuous_usage_stats or body.logprobs is not None)
        self._of_text: dict[int, TextEvents] = {}

    def take(self, prompt: int, chunk: Chunk) -> None:
        """Remember a chunk."""
        self._collection.add(prompt, chunk)

    def whole(self) -> Json:
        """The body of an answer that is not streamed."""
        choices = [self._choice(i, collected) for i, collected in enumerate(self._collection.choices)]
        return self._wrap(choices) | {"usage": usage_json(self._collection.usage())}

    def events(self, prompt: int, chunk: Chunk) -> bytes:
        """One event per chunk."""
        index = self._collection.count(prompt, chunk)
        if not self._only_text or chunk.finish_reason is not None:
            return event(self._event(index, chunk))
        if index not in self._of_text:
            self._of_text[index] = TextEvents(lambda text: self._event(index, Chunk("", index, text)))
        return self._of_text[index].event(chunk.text)

    def closing(self) -> Iterator[Json]:
        """The usage event, if it was asked for."""
        if self._body.stream_options.include_usage:
            yield self._wrap([]) | {"usage": usage_json(self._collection.usage())}

    def _event(self, index: int, chunk: Chunk) -> Json:
        first = self._collection.num_tokens[index] == len(chunk.token_ids)
        return self._wrap([self._choice(index, chunk, first)]) | _usage_beside(self._body.stream_options, self._collection)

    def _wrap(self, choices: list[Json]) -> Json:
        frame = self._frame
        return {"id": frame.id, "object": "text_completion", "created": frame.created, "model": frame.model, "choices": choices}

    def _choice(self, index: int, part: Chunk | Collected, first: bool = True) -> Json:
        choice = {
            "index": index,
            "text": part.text,
            "logprobs": self._logprobs(index, part.logprobs),
            "finish_reason": part.finish_reason,
            "stop_reason": _stop_reason(self._frame.tokenizer, self._body, part),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(part.token_ids)
            if first:
                choice["prompt_token_ids"] = list(self._frame.prompt_ids[index // self._body.n])
        return choice

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if self._body.logprobs is None or not logprobs:
            return None
        content = _legacy_logprobs(self._frame.tokenizer, logprobs, self._offsets[index])
        self._offsets[index] += sum(len(token) for token in content["tokens"])
        return content


class ChatAnswer:
    """The answer to one ChatBody."""

    def __init__(self, frame: Frame, body: ChatBody) -> None:
        self._frame = frame
        self._body = body
        self._collection = Collection(1, body.n, frame.prompt_ids)
        self._only_text = not (body.return_token_ids or body.stream_options.continuous_usage_stats or body.logprobs)
        self._of_text: dict[int, TextEvents] = {}

    def take(self, prompt: int, chunk: Chunk) -> None:
        """Remember a chunk."""
        self._collection.add(prompt, chunk)

    def whole(self) -> Json:
        """The body of an answer that is not streamed."""
        choices = [self._full(i, collected) for i, collected in enumerate(self._collection.choices)]
        return self._wrap("chat.completion", choices) | self._prompt_ids() | {"usage": usage_json(self._collection.usage())}

    def events(self, prompt: int, chunk: Chunk) -> bytes:
        """One event per chunk; before a choice's first one, who speaks."""
        index = self._collection.count(prompt, chunk)
        known = self._of_text.get(index)
        if known is not None and self._only_text and chunk.finish_reason is None:
            return known.event(chunk.text)
        said = event(self._event([self._ending(index, chunk) | {"delta": {"content": chunk.text}}]))
        return said if known is not None else self._greeting(index) + said

    def _greeting(self, index: int) -> bytes:
        hello = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        said = event(self._event([hello]) | ({} if self._of_text else self._prompt_ids()))
        ending = self._ending(index, Chunk("", index))
        self._of_text[index] = TextEvents(lambda text: self._event([ending | {"delta": {"content": text}}]))
        return said

    def closing(self) -> Iterator[Json]:
        """The usage event, if it was asked for."""
        if self._body.stream_options.include_usage:
            yield self._wrap("chat.completion.chunk", []) | {"usage": usage_json(self._collection.usage())}

    def _event(self, choices: list[Json]) -> Json:
        return self._wrap("chat.completion.chunk", choices) | _usage_beside(self._body.stream_options, self._collection)

    def _wrap(self, kind: str, choices: list[Json]) -> Json:
        frame = self._frame
        return {"id": frame.id, "object": kind, "created": frame.created, "model": frame.model, "choices": choices}

    def _full(self, index: int, collected: Collected) -> Json:
        return self._ending(index, collected) | {"message": {"role": "assistant", "content": collected.text, "refusal": None}}

    def _ending(self, index: int, part: Chunk | Collected) -> Json:
        logprobs = _chat_logprobs(self._frame.tokenizer, part.logprobs) if self._body.logprobs and part.logprobs else None
        reason = _stop_reason(self._frame.tokenizer, self._body, part)
        ending = {"index": index, "logprobs": logprobs, "finish_reason": part.finish_reason, "stop_reason": reason}
        return ending | ({"token_ids": list(part.token_ids)} if self._body.return_token_ids else {})

    def _prompt_ids(self) -> Json:
        return {"prompt_token_ids": list(self._frame.prompt_ids[0])} if self._body.return_token_ids else {}


def needs_prompt_ids(body: OpenAIBody) -> bool:
    """Whether the answer holds the prompts' token ids, or counts them before the last chunk does."""
    return body.return_token_ids or (body.stream and body.stream_options.continuous_usage_stats)


def _stop_reason(tokenizer: Tokenizer, body: OpenAIBody, part: Chunk | Collected) -> int | str | None:
    """The stop string or id that the client had named; null for an end-of-sequence token, as in vLLM."""
    by_itself = part.stopped_by in tokenizer.eos_ids and part.stopped_by not in body.stop_token_ids
    return None if by_itself else part.stopped_by


def _usage_beside(options: StreamOptions, collection: Collection) -> Json:
    if options.continuous_usage_stats:
        return {"usage": usage_json(collection.usage_so_far())}
    return {"usage": None} if options.include_usage else {}


def _legacy_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], offset: int) -> Json:
    tokens = [tokenizer.token_text(item.token_id) for item in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [finite(item.logprob) for item in logprobs],
        "top_logprobs": [_top_by_text(tokenizer, item) for item in logprobs],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)),
    }


def _top_by_text(tokenizer: Tokenizer, item: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the sampled one; of two with the same text the likelier stays."""
    top: dict[str, float] = {}
    for token_id, logprob in (*item.top, (item.token_id, item.logprob)):
        text = tokenizer.token_text(token_id)
        top[text] = max(top.get(text, finite(logprob)), finite(logprob))
    return top


def _chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> Json:
    content = [
        _chat_logprob(tokenizer, item.token_id, item.logprob)
        | {"top_logprobs": [_chat_logprob(tokenizer, token_id, logprob) for token_id, logprob in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> Json:
    return {"token": tokenizer.token_text(token_id), "logprob": finite(logprob), "bytes": list(tokenizer.token_bytes(token_id))}
