"""A bounded memory of what is over, so that late messages find an answer: the newest entries, each for a while. Pure but for the clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from baton.deadline import now_s

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


class Remembered(Generic[Name, Value]):
    """At most `most` values, the oldest going first; none older than keep_s. A value that is put again is new again.

    clock: seconds; the running loop's unless told otherwise.
    """

    def __init__(self, most: int, keep_s: float, clock: Callable[[], float] = now_s) -> None:
        self._most = most
        self._keep_s = keep_s
        self._clock = clock
        self._values: OrderedDict[Name, tuple[float, Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def put(self, name: Name, value: Value) -> None:
        """Remember a value from now on."""
        self._values.pop(name, None)
        self._values[name] = (self._clock() + self._keep_s, value)
        self._drop_old()

    def get(self, name: Name) -> Value | None:
        """What was put under this name, unless it is too old or too many came after it."""
        self._drop_old()
        known = self._values.get(name)
        return known[1] if known else None

    def _drop_old(self) -> None:
        now = self._clock()
        while self._values:
            until_s, _ = next(iter(self._values.values()))
            if len(self._values) <= self._most and until_s > now:
                return
            self._values.popitem(last=False)
