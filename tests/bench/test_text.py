"""Windows are where they say: even, in order, never overlapping; and the shipped text is what the demo model's card counts."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from bench.text import prompts, read_tokens, windows

ROOT = Path(__file__).parents[2]


@given(st.integers(2, 400), st.none() | st.integers(1, 50), st.integers(1, 40))
def test_windows_are_runs_of_the_text(num_tokens: int, num_windows: int | None, window_len: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.int64)
    available = (num_tokens - 1) // window_len
    if not available:
        with pytest.raises(ConfigError, match=rf"no window of {window_len} "):
            windows(tokens, num_windows, window_len)
        return
    cut = windows(tokens, num_windows, window_len)
    assert len(cut) == min(num_windows or available, available)
    assert (cut - cut[:, :1] == np.arange(window_len + 1)).all()
    assert (np.diff(cut[:, 0]) >= window_len).all()


def test_prompts_are_as_many_as_asked_or_none() -> None:
    tokens = np.arange(101, dtype=np.int64)
    assert prompts(tokens, 10, 4, 10).tolist() == [[start, start + 1, start + 2, start + 3] for start in range(0, 100, 10)]
    with pytest.raises(ConfigError, match="10 of 11 prompts"):
        prompts(tokens, 11, 4, 10)


def test_a_missing_text_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read"):
        read_tokens(Path("nowhere.txt"), ROOT / "demo" / "model")


def test_the_shipped_text_is_the_held_out_side_of_the_demo_models_corpus() -> None:
    """As many tokens as its card says; `python -m demo.train.held_out` compares the corpus itself, and writes it anew."""
    card = (ROOT / "demo" / "model" / "README.md").read_text(encoding="utf-8")
    counted = re.search(r"\| Held out \|.* ([\d,]+) tokens \|", card)
    assert counted is not None
    assert f"{len(read_tokens(ROOT / 'demo' / 'held_out.txt', ROOT / 'demo' / 'model')):,}" == counted[1]
