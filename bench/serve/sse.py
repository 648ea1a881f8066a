"""Server-sent events of OpenAI's streaming answers, at the least cost per token. Sans I/O: bytes in, what they mean out.

The generator shares the machine with the server it measures, so an event is only parsed as JSON where its bytes do not already say
that it is a token: usage, errors, and a chat's greeting, which names the role and carries no token.
"""

from __future__ import annotations

import json
import re
from typing import Any

from bench.serve.answers import Answer

# JSON escapes the quotes of what the model says, so generated text can match neither of these.
_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\{')
_ROLE = re.compile(rb'"role"\s*:\s*"')
_DONE = b"[DONE]"
_MAX_SHOWN = 500


class Events:
    """Reads one answer's stream into an Answer. with_text: keep what was said, which costs parsing every event."""

    def __init__(self, answer: Answer, *, with_text: bool = False) -> None:
        self._answer = answer
        self._with_text = with_text
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take a piece of the body. Raises ValueError, which says what the server reported or what is no event."""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *whole, self._rest = (self._rest + data if self._rest else data).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                self._take(event[5:], now_s)

    def _take(self, payload: bytes, now_s: float) -> None:
        is_choice = _CHOICES.search(payload) is not None
        if is_choice and not self._with_text and _ROLE.search(payload) is None:
            self._answer.token_s.append(now_s)
        elif payload.strip() != _DONE:
            said = json.loads(payload)
            if not isinstance(said, dict):
                raise ValueError(f"an event holds no JSON object: {payload[:_MAX_SHOWN]!r}")
            self._look(said, now_s)

    def _look(self, said: dict[str, Any], now_s: float) -> None:
        if error := said.get("error"):
            raise ValueError(f"the stream ended in an error: {json.dumps(error)[:_MAX_SHOWN]}")
        for choice in said.get("choices") or ():
            delta = choice.get("delta", choice)
            text = delta.get("content") or delta.get("text") or ""
            if text or "role" not in delta:
                self._answer.token_s.append(now_s)
                if self._with_text:
                    self._answer.texts.append(text)
        if usage := said.get("usage"):
            self._answer.output_len = usage.get("completion_tokens")
            self._answer.prompt_len = usage.get("prompt_tokens")
