"""What a hostile peer might send: strategies for bytes and messages, and an ear for what should never be logged.

How hard a test tries follows the hypothesis profile: `make fuzz` uses "long", which tries a hundred times as often.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)
_USUAL = 100
PATIENCE_S = 20.0
WRITTEN_TOO_LATE = "Internal error from Core"  # what gRPC says here of a write to a call that the other end has just ended


def effort(num_examples: int) -> settings:
    """Settings for a test that tries so often in the usual profile; fixtures are made once for all examples."""
    times = max(1, settings().max_examples // _USUAL)
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    # Not made smaller: that takes as many exchanges again, and an assertion here says itself which bytes were too much.
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(max_examples=num_examples * times, suppress_health_check=suppressed, deadline=None, phases=phases)


def noise(good: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that have nothing to do with `good`, or are it but for a few: flipped, cut off, doubled, put in."""
    return st.binary(max_size=200) | _spoilt(good)


@st.composite
def _spoilt(draw: st.DrawFn, good: bytes) -> bytes:
    raw = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["flip", "cut", "double", "put"])):
            case "flip" if at < len(raw):
                raw[at] ^= draw(st.integers(1, 255))
            case "cut":
                del raw[at : at + draw(st.integers(1, 40))]
            case "double":
                raw[at:at] = raw[at : at + draw(st.integers(1, 40))]
            case _:
                raw[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(raw)


_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, math.inf, -math.inf, math.nan]
_TEXTS = ["", "\0", "a\nb", "é" * 300, "x" * 5000, "127.0.0.1:1", "@x", "float32", "prefill-0"]
_BYTES = [b"", bytes(16), b"r" * 16, bytes(15), b"x" * 5000]


@functools.cache  # there are as many as kinds of messages, and making one takes longer than drawing from it
def messages(kind: type[M], depth: int = 4) -> st.SearchStrategy[M]:
    """Messages of a kind with any of its fields set, to values at the edges of what they can hold."""
    return st.builds(lambda fields: _filled(kind(), fields), st.fixed_dictionaries({}, optional=_fields(kind, depth)))


def near(good: M) -> st.SearchStrategy[M]:
    """`good` with some of its fields overwritten, or made longer."""
    return messages(type(good)).map(lambda other: _merged(good, other))


def _merged(good: M, other: M) -> M:
    merged = type(good)()
    merged.CopyFrom(good)
    merged.MergeFrom(other)
    return merged


def _fields(kind: type[Message], depth: int) -> dict[Any, st.SearchStrategy[Any]]:
    fields = kind.DESCRIPTOR.fields
    return {field.name: _values(field, depth) for field in fields if depth or field.message_type is None}


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one = _value(field, depth)
    if field.is_repeated:
        return st.lists(one, max_size=3) | st.builds(lambda item, count: [item] * count, one, st.integers(4, 3000 if depth > 3 else 40))
    return one


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type._concrete_class, depth - 1)
    if field.enum_type is not None:
        return st.integers(0, 4) | st.sampled_from([77, 2**31 - 1])
    if field.cpp_type in _INTEGERS:
        least, most = _INTEGERS[field.cpp_type]
        return st.integers(max(least, -2), 40) | st.sampled_from([least, most, most - 1, most // 2]) | st.integers(least, most)
    return {
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from(_FLOATS),
        FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from([*_FLOATS, 1e300]),
        FieldDescriptor.CPPTYPE_STRING: (
            st.sampled_from(_BYTES) | st.binary(max_size=20)
            if field.type == FieldDescriptor.TYPE_BYTES
            else st.sampled_from(_TEXTS) | st.text(max_size=20)
        ),
    }[field.cpp_type]


def _filled(message: M, fields: dict[str, Any]) -> M:
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        elif isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


class Alarms(logging.Handler):
    """Hears what must not be: errors in the log, and exceptions that nobody but the event loop caught."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(f"{record.getMessage()} {self.format(record)}")

    def loop_failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.heard.append(repr(context))


@contextmanager
def no_alarms() -> Iterator[Alarms]:
    """Nothing is logged as an error in here, and nothing raised into the void."""
    alarms, loop = Alarms(), asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(alarms.loop_failed)
    logging.getLogger().addHandler(alarms)
    try:
        yield alarms
    finally:
        logging.getLogger().removeHandler(alarms)
        loop.set_exception_handler(before)
    assert not alarms.heard, "\n".join(alarms.heard)
