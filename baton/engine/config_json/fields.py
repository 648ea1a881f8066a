"""Typed reading of a parsed config.json: every value is checked where it is read. Knows no model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from baton.errors import ConfigError

Config = Mapping[str, Any]
MOST = (1 << 31) - 1  # JSON knows no limit; nothing that is counted in a model comes near this one
_LARGEST = sys.float_info.max  # an int beyond it is finite, too, and is no float


class Fields:
    """A JSON object. A field that is absent or null has the default given, and is refused where none is given.

    All methods raise ConfigError naming the field and what was found.
    """

    def __init__(self, values: Config) -> None:
        self._values = values

    def given(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least` and at most 2 ** 31 - 1."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:  # of inf and nan the rest is nan
            raise ConfigError(f"config.json needs a whole number for {name}, found {value!r}")
        if value < least:
            raise ConfigError(f"config.json: {name}={value} must be at least {least}")
        if value > MOST:
            raise ConfigError(f"config.json: {name}={value} must be at most {MOST}")
        return int(value)

    def number(self, name: str, default: float | None = None, least: float = -math.inf) -> float:
        """A finite number of at least `least`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
            raise ConfigError(f"config.json needs a finite number for {name}, found {value!r}")
        if value < least:
            raise ConfigError(f"config.json: {name}={value:g} must be at least {least:g}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise ConfigError(f"config.json: {name}={value:g} must be above 0")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json needs true or false for {name}, found {value!r}")
        return value

    def choice(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """One of the known names; others are refused with the list."""
        value = self._value(name, default)
        if value not in known:
            raise ConfigError(f"{name} {value!r} is not supported; supported {'are' if len(known) > 1 else 'is'} {', '.join(known)}")
        return str(value)

    def inner(self, name: str) -> Config:
        """A JSON object within this one; empty if absent."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"config.json needs an object for {name}, found {value!r}")
        return value or {}

    def listed(self, name: str) -> list[Any]:
        """A JSON list; empty if absent."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, list | tuple):
            raise ConfigError(f"config.json needs a list for {name}, found {value!r}")
        return list(value or ())

    def _value(self, name: str, default: object) -> Any:
        value = self._values.get(name)
        return default if value is None else value
