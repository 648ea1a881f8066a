"""A text as tokens, and evenly spaced windows of it: the same at every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from baton.errors import ConfigError
from baton.tokenizer import Tokenizer
from bench.agreement import Ids


def read_tokens(path: Path, model_dir: Path) -> Ids:
    """A text file in the tokens of a checkpoint, [n]. Raises ConfigError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    return np.array(Tokenizer.load(model_dir).encode(text, add_special_tokens=False), np.int64)


def windows(tokens: Ids, num_windows: int | None, window_len: int) -> Ids:
    """At most num_windows windows (None: all there are) of window_len tokens and the one after them, [Q, window_len + 1].

    They do not overlap but for that one token. Raises ConfigError if the text holds none.
    """
    available = (len(tokens) - 1) // window_len
    if available < 1:
        raise ConfigError(f"the text has {len(tokens)} tokens, of which no window of {window_len} can be cut: give a longer --text")
    chosen = np.linspace(0, available - 1, min(num_windows or available, available)).astype(np.int64)
    return np.stack([tokens[start : start + window_len + 1] for start in (chosen * window_len).tolist()])


def prompts(tokens: Ids, num_prompts: int, prompt_len: int, spacing: int) -> Ids:
    """Exactly num_prompts beginnings of windows of `spacing` tokens, [Q, prompt_len]. Raises ConfigError if the text is too short."""
    cut = windows(tokens, num_prompts, spacing)
    if len(cut) < num_prompts:
        raise ConfigError(f"the text has {len(tokens)} tokens, enough for {len(cut)} of {num_prompts} prompts {spacing} tokens apart")
    return np.ascontiguousarray(cut[:, :prompt_len])
