"""One sequence's tokens as the chunks its client sees: text, stop strings, what ended it. Knows no nodes and no waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.detokenizer import Detokenizer, StopStrings
from baton.request import Chunk, FinishReason, Sampling, Usage
from baton.tokenizer import Tokenizer
from router.life import Delivery


@dataclass(frozen=True, slots=True)
class Prepared:
    """A client's request after validation: every number resolved, every default applied.

    samplings: one per sequence, alike but for the seed. echo_text: what precedes each answer, "" without echo.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    samplings: tuple[Sampling, ...]
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    echo_text: str = ""


class Choice:
    """State owner: the one iterator that reads this answer.

    num_tokens: output tokens that count, up to and with the one that completed a stop string. finish_reason: None while it goes on.
    """

    def __init__(self, prepared: Prepared, index: int, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._request_id = prepared.request_id
        self._index = index
        self._sampling = prepared.samplings[index]
        self._detokenizer = Detokenizer(tokenizer, prepared.skip_special_tokens)
        self._stops = StopStrings(prepared.stop, self._sampling.min_tokens)
        self._is_plain = not prepared.stop
        self._unsaid = prepared.echo_text
        self._seed: int | None = self._sampling.seed

    def take(self, delivery: Delivery) -> Chunk:
        """The chunk for newly delivered tokens. Nothing may be delivered after one that set finish_reason."""
        assert self.finish_reason is None
        if self._is_plain and delivery.finish_reason is None and len(delivery.token_ids) == 1:
            return self._plain(delivery)
        by_token = delivery.finish_reason is FinishReason.STOP
        ids = delivery.token_ids
        pieces = [self._detokenizer.push((token_id,)) for token_id in (ids[:-1] if by_token else ids)]
        last = delivery.finish_reason is not None
        emitted = self._stops.push([*pieces, self._detokenizer.flush()] if last else pieces)
        if emitted.stop is not None:
            return self._chunk(delivery, emitted.text, min(emitted.num_pieces, len(ids)), FinishReason.STOP, emitted.stop)
        text = emitted.text + self._stops.flush() if last else emitted.text
        return self._chunk(delivery, text, len(ids), delivery.finish_reason, self._stop_id(ids) if by_token else None)

    def _plain(self, delivery: Delivery) -> Chunk:
        """One token, and nothing that could stop at it: what nearly every chunk is."""
        text = self._detokenizer.push_one(delivery.token_ids[0])
        if self._seed is not None:
            return self._chunk(delivery, text, 1, None, None)
        self.num_tokens += 1
        return Chunk(self._request_id, self._index, text, delivery.token_ids, delivery.logprobs)

    def _stop_id(self, token_ids: tuple[int, ...]) -> int | None:
        return token_ids[-1] if token_ids else None

    def _chunk(self, delivery: Delivery, text: str, count: int, reason: FinishReason | None, stopped_by: int | str | None) -> Chunk:
        self.num_tokens += count
        self.finish_reason = reason
        text, self._unsaid = self._unsaid + text, ""
        seed, self._seed = self._seed, None
        return Chunk(
            request_id=self._request_id,
            choice=self._index,
            text=text,
            token_ids=delivery.token_ids[:count],
            logprobs=delivery.logprobs[:count],
            finish_reason=reason,
            stopped_by=stopped_by,
            seed=seed,
        )


def total_usage(prepared: Prepared, choices: Sequence[Choice], cached_tokens: Sequence[int | None]) -> Usage:
    """What the whole request used. The prompt counts once; cached is what the least lucky of its sequences found."""
    known = [count for count in cached_tokens if count is not None]
    completion = sum(choice.num_tokens for choice in choices)
    return Usage(len(prepared.prompt_ids), completion, min(known, default=0))


def whole(chunks: Sequence[Chunk]) -> Chunk:
    """All chunks of one choice, in order, as the single chunk of an answer that is not streamed."""
    last = chunks[-1]
    return Chunk(
        request_id=last.request_id,
        choice=last.choice,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        usage=last.usage,
        seed=chunks[0].seed,
        is_delta=False,
        served_by=last.served_by,
    )
