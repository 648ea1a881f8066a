"""A client's body as JSON: what it must be before it can mean anything. Pure; knows no fields."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from baton.errors import InvalidRequest

MAX_DEPTH = 64  # objects and arrays within each other
SHOWN_CHARS = 120


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`: its strings are Unicode text, its numbers finite, its keys unique, and it is not deeper than MAX_DEPTH."""
    try:
        text = body.decode("utf-8")
        content = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(content):
            raise RecursionError
        if "\\u" in text:  # only an escape can spell half a surrogate pair, which is no text
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from error
    except UnicodeEncodeError as error:
        raise InvalidRequest("the body holds half a surrogate pair (an escape from \\ud800 to \\udfff alone), which is no text") from error
    except RecursionError as error:
        raise InvalidRequest(f"the body is nested too deeply: at most {MAX_DEPTH} objects and arrays within each other") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body must be a JSON object (given: {shown(content)})")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:SHOWN_CHARS]} is too large a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice[:SHOWN_CHARS]!r} more than once")
    return content


def _is_deep(content: object) -> bool:
    """Level by level, since what is deep is not to be visited by recursion."""
    level: list[object] = [content]
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
    return bool(level)


def _items(outer: object) -> Iterable[object]:
    return outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()


def shown(value: object) -> str:
    """A value of the client's, or the start of it, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
