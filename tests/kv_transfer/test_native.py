"""The compiled loop is found where it was built from these very sources, and nowhere else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.native import build

NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources in a directory of their own."""
    source = tmp_path / "spans.c"
    shutil.copy(build.SOURCE, source)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    return source


@NEEDS_COMPILER
def test_it_is_compiled_once_and_replaced_when_the_source_changes(elsewhere: Path) -> None:
    said: list[str] = []
    (library,) = build.build(said.append)
    made_at = library.stat().st_mtime_ns
    assert build.build(said.append) == [library] == [build.library_path()] and library.stat().st_mtime_ns == made_at
    elsewhere.write_text(elsewhere.read_text(encoding="utf-8") + "\nint baton_more;\n", encoding="utf-8")
    assert not build.library_path().exists(), "what was made of another source is not found"
    (other,) = build.build(said.append)
    assert other.exists() and not library.exists() and not said


@NEEDS_COMPILER
def test_a_source_that_does_not_compile_is_told_with_the_compilers_words(elsewhere: Path) -> None:
    elsewhere.write_text("nonsense", encoding="utf-8")
    with pytest.raises(build.CompileError, match="nonsense"):
        build.build(print)
    assert list((elsewhere.parent / "built").iterdir()) == []


def test_without_a_compiler_it_says_so(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    said: list[str] = []
    assert build.build(said.append) == [] and "no C compiler" in said[0]


def test_without_the_library_python_copies(tmp_path: Path) -> None:
    """In a process of its own, where nothing was found before."""
    program = f"""
import logging, pathlib
from kv_transfer.native import build
build.BUILT = pathlib.Path({str(tmp_path)!r})
from kv_transfer.copying import move
from kv_transfer.native import copy_spans
from kv_transfer.transport import Span, Spans
target = bytearray(4)
move(Spans.of([Span(0, 2, 2), Span(2, 0, 2)]), memoryview(b"abcd"), memoryview(target))
assert copy_spans() is None and target == b"cdab", target
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "make kernels" in done.stderr
