"""What became of one request. Times are seconds on one monotonic clock; who fills it in is a backend and the load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.serve.asks import Ask


@dataclass(slots=True)
class Answer:
    """One request from its arrival to its end. Owner: the load; a backend writes what arrives until it calls `done`.

    arrival_s: when the schedule wanted it. due_s: when it was to be sent: at its arrival, or when --max-concurrency let it go.
    sent_s: when its bytes were handed to the kernel, if they were. All latencies count from due_s, so that a late generator hides nothing.
    token_s: one time per event that carried tokens. output_len, prompt_len: as the server counted them, None if it did not say.
    """

    ask: Ask
    arrival_s: float
    due_s: float = 0.0
    sent_s: float | None = None
    end_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    prompt_len: int | None = None
    output_len: int | None = None
    texts: list[str] = field(default_factory=list)
    error: str = ""
    ended: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether it ended, and well."""
        return self.ended and not self.error

    @property
    def late_s(self) -> float:
        """How long after it was due it left; 0 if it never did."""
        return 0.0 if self.sent_s is None else self.sent_s - self.due_s

    @property
    def num_prompt(self) -> int:
        """Prompt tokens: the server's count, else ours."""
        return self.ask.prompt_len if self.prompt_len is None else self.prompt_len

    @property
    def num_output(self) -> int:
        """Output tokens: the server's count, else one per event."""
        return len(self.token_s) if self.output_len is None else self.output_len

    def end(self, now_s: float, error: str = "") -> None:
        """It is over. An answer without a token is no answer."""
        assert not self.ended, "a request ends once"
        self.end_s, self.ended = now_s, True
        self.error = error or ("" if self.token_s else "the server sent no token")


Done = Callable[[Answer], None]
