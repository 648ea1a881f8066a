"""The text that every Python installation carries: sources, docstrings and pydoc topics.

Knows where the text lies, how it is named, and which files are held out.
Knows nothing of tokens or models. The order is fixed, so one Python release has one hash.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_PERCENT = 4
DOCSTRING_MIN = 40

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings"}
    | {"pydoc_data", "ensurepip", "__phello__", "__pycache__"}
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_PUBLIC_NAMES = {"posixpath": "os.path", "_pydecimal": "decimal", "_pyio": "io", "_collections_abc": "collections.abc"}
_COMPILED_MODULES = (
    *("array", "binascii", "bisect", "builtins", "cmath", "collections", "errno", "functools", "gc", "hashlib"),
    *("heapq", "io", "itertools", "json", "marshal", "math", "operator", "os", "pickle", "random", "re", "select"),
    *("signal", "socket", "struct", "sys", "threading", "time", "unicodedata", "weakref", "zlib"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing: `json.dumps`, its signature, its docstring and, where short enough to show, its source."""

    name: str
    kind: str  # "module" | "class" | "function" | "topic"
    signature: str
    doc: str
    source: str


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the file it comes from; a file and all that is derived from it fall on one side of the split."""

    file: str
    text: str
    entries: tuple[Entry, ...] = ()

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.file.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, slots=True)
class Corpus:
    """All documents in their fixed order."""

    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.file}\0{document.text}\0".encode())
        return digest.hexdigest()

    def side(self, *, held_out: bool) -> list[Document]:
        return [document for document in self.documents if document.held_out is held_out]


def collect(limit: int | None = None) -> Corpus:
    """Reads the running interpreter's standard library, in one fixed order; `limit` keeps the first source files."""
    sources = list(islice(_sources(Path(sysconfig.get_path("stdlib"))), limit))
    return Corpus((*sources, *_manuals(sources), *_compiled_manuals(), *_topics()))


def _sources(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        file = path.relative_to(root).as_posix()
        if _wanted(file):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(file, text, tuple(_documented(file, text)))


def _wanted(file: str) -> bool:
    parts = file.split("/")
    skipped = _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(_SKIPPED_PREFIXES) for part in parts)
    return not skipped


def _module_name(file: str) -> str:
    dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return _PUBLIC_NAMES.get(dotted, dotted)


def _documented(file: str, text: str) -> Iterator[Entry]:
    module = ast.parse(text)
    name = _module_name(file)
    if "._" in f".{name}":  # a private module
        return
    if doc := _docstring(module):
        yield Entry(name, "module", f"import {name}", doc, "")
    yield from _members(module, name, text.splitlines())


def _members(scope: ast.Module | ast.ClassDef, prefix: str, lines: list[str]) -> Iterator[Entry]:
    for node in scope.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if doc := _docstring(node):
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            yield Entry(name, _kind(node), _signature(name, node), doc, source)
        if isinstance(node, ast.ClassDef):
            yield from _members(node, name, lines)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    doc = ast.get_docstring(node) or ""
    return doc if len(doc) >= DOCSTRING_MIN else ""


def _kind(node: ast.AST) -> str:
    return "class" if isinstance(node, ast.ClassDef) else "function"


def _signature(name: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}({', '.join(map(ast.unparse, node.bases))})"
    return f"{name}({ast.unparse(node.args)})"


def _manuals(sources: list[Document]) -> Iterator[Document]:
    for source in sources:
        if source.entries:
            yield Document(source.file, manual(source.entries))


def manual(entries: tuple[Entry, ...]) -> str:
    """Docstrings as a page of documentation: each signature, then its text, indented."""
    return "\n\n".join(f"{entry.signature}\n\n{_indented(entry.doc)}" for entry in entries) + "\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _compiled_manuals() -> Iterator[Document]:
    for name in _COMPILED_MODULES:
        entries = tuple(_compiled_entries(name, vars(importlib.import_module(name))))
        yield Document(f"{name} (compiled)", manual(entries), entries)


def _compiled_entries(prefix: str, members: dict[str, object]) -> Iterator[Entry]:
    for short, member in sorted(members.items()):
        if short.startswith("_"):
            continue
        name = f"{prefix}.{short}".removeprefix("builtins.")
        if (inspect.isbuiltin(member) or inspect.ismethoddescriptor(member)) and (doc := inspect.getdoc(member)):
            yield Entry(name, "function", _compiled_signature(name, member), doc, "")
        elif inspect.isclass(member) and prefix == "builtins" and not issubclass(member, BaseException):
            yield Entry(name, "class", f"class {name}", inspect.getdoc(member) or "", "")
            yield from _compiled_entries(name, dict(vars(member)))


def _compiled_signature(name: str, member: object) -> str:
    assert callable(member)
    try:
        return f"{name}{inspect.signature(member)}"
    except ValueError:  # some compiled functions state no signature
        return f"{name}(...)"


def _topics() -> Iterator[Document]:
    for name, text in sorted(topics.items()):
        doc = text.strip()
        yield Document(f"topic {name}", doc + "\n", (Entry(name, "topic", "", doc, ""),))
