"""A bounded memory against an unbounded one: what it gives is what was put last, and what it has lost was old or one too many."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ranks.remembered import Remembered

MOST, KEEP_S = 4, 10.0


class Memory(RuleBasedStateMachine):
    """Puts and gets in any order while time goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.kept = Remembered[str, int](MOST, KEEP_S, clock=lambda: self.now_s)
        self.all: list[tuple[float, str, int]] = []  # the newest last, one per name

    names = st.sampled_from("abcdef")

    @rule(name=names, value=st.integers(0, 3))
    def put(self, name: str, value: int) -> None:
        self.kept.put(name, value)
        self.all = [(at_s, other, old) for at_s, other, old in self.all if other != name] + [(self.now_s, name, value)]

    @rule(name=names)
    def get(self, name: str) -> None:
        young = [(other, value) for at_s, other, value in self.all[-MOST:] if at_s + KEEP_S > self.now_s]
        assert self.kept.get(name) == dict(young).get(name)

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def it_is_bounded(self) -> None:
        assert len(self.kept) <= MOST


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
