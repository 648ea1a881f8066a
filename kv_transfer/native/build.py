"""Compiles spans.c into a shared library beside it. Knows the compiler and nothing else.

Needs the standard library only, for it runs at install (hatch_build.py), when nothing else may be there, and as a script
(`make kernels`). The library is named by what it was made of: one of other sources is never found, and goes with the next build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "spans.c"
BUILT = SOURCE.parent / "built"
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-Wall", "-Werror")
_TIMEOUT_S = 120


class CompileError(Exception):
    """The compiler is there and did not like the source. The text is what it said."""


def library_path() -> Path:
    """Where the library of the present source is, once it has been built."""
    made_of = SOURCE.read_bytes() + " ".join(_FLAGS).encode()
    return BUILT / f"spans-{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def build(report: Callable[[str], None]) -> list[Path]:
    """Compile unless that is done; the library's path. None without a compiler, which is told to `report`. Raises CompileError."""
    library = library_path()
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
        if compiler is None:
            report("no C compiler found (cc, gcc or clang): KV blocks are copied by Python, which is slower where spans are short")
            return []
        _compile(compiler, library)
    for other in set(BUILT.glob("*.so")).difference([library]):
        other.unlink(missing_ok=True)
    return [library]


def _compile(compiler: str, library: Path) -> None:
    """Under another name first: two builds may run at once, and a process may be about to load the library."""
    BUILT.mkdir(exist_ok=True)
    partial = library.with_name(f"{library.name}.{os.getpid()}.partial")
    command = [compiler, *_FLAGS, "-o", str(partial), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    os.replace(partial, library)


def main() -> int:
    """Build for this machine; 1 if the source does not compile, 0 also where there is no compiler."""
    try:
        libraries = build(print)
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    for path in libraries:
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
