"""When somebody who says nothing counts as gone, against the rule written down plainly."""

import math

from hypothesis import given
from hypothesis import strategies as st

from ranks.silence import Silence, beats_in


@given(st.integers(1, 6), st.booleans(), st.lists(st.booleans(), max_size=30))
def test_gone_after_so_many_beats_in_a_row_without_a_word(patience: int, judged: bool, heard: list[bool]) -> None:
    silence = Silence(patience, judged)
    for beat, word in enumerate(heard, 1):
        gone = silence.beat(word)
        last = heard[max(0, beat - patience) : beat]
        known = judged or any(heard[:beat])
        assert gone is (known and len(last) == patience and not any(last))


@given(st.integers(1, 6), st.integers(0, 30))
def test_whoever_is_still_loading_is_not_judged(patience: int, num_beats: int) -> None:
    silence = Silence(patience, judged=False)
    assert not any(silence.beat(False) for _ in range(num_beats))


@given(st.floats(0.001, 1000), st.floats(0.01, 10))
def test_the_beats_last_at_least_so_long_and_no_beat_more(seconds: float, beat_s: float) -> None:
    beats = beats_in(seconds, beat_s)
    assert beats >= 1
    assert beats * beat_s >= seconds or math.isclose(beats * beat_s, seconds)
    assert beats == 1 or (beats - 1) * beat_s < seconds
