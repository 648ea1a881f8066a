"""The configuration as a document: every setting with its default and what it means, generated from baton/config.py.

Knows: pydantic fields. Does not know: what any of them does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from baton.config import BatonConfig

_WIDTH = 110
_EXAMPLE_MODEL = "path/to/checkpoint"


def documented_defaults() -> str:
    """A YAML file that `load_config` reads as all defaults (of a model at path/to/checkpoint), each setting under its description."""
    head = "# Baton's settings and their defaults. Sizes may be written as 512MiB or 2GiB. Leave out what you do not change."
    return "\n".join([head, *_section(BatonConfig, 0)]) + "\n"


def description(dotted: str) -> str:
    """What a setting such as "router.http_port" means."""
    section: type[BaseModel] = BatonConfig
    *outer, last = dotted.split(".")
    for name in outer:
        section = _section_of(section.model_fields[name]) or section
    return section.model_fields[last].description or ""


def _section(section: type[BaseModel], depth: int) -> Iterator[str]:
    margin = "  " * depth
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            yield f"\n{margin}{name}:" if not depth else f"{margin}{name}:"
            yield f"{margin}  # {(inner.__doc__ or '').splitlines()[0]}"
            yield from _section(inner, depth + 1)
        else:
            yield from textwrap.wrap(field.description or "", _WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
            yield f"{margin}{name}: {_scalar(_default(name, field))}"


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(name: str, field: FieldInfo) -> Any:
    if field.is_required():
        assert name == "model", name
        return _EXAMPLE_MODEL
    value = field.get_default(call_default_factory=True)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**20}MiB"
    return list(value) if isinstance(value, tuple) else value


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("...").rstrip()
