"""Compiles the kernels: one shared library per instruction level, each of all *.c files in this directory.

Needs the standard library only, for it runs at install (hatch_build.py), when nothing else may be there, and as a script
(`make kernels`). Objects are named by what they are made of, so what has not changed is not compiled again. The libraries are
compiled with OpenMP and not linked with it: they use the copy that torch has loaded, and with it torch's threads.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = HERE / "built"
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Werror"),
)
# Where results shall equal torch's bit for bit, a product must be rounded before it is added to.
_FLAGS_OF = dict.fromkeys(("elementwise.c", "gemm.c", "moe.c", "sampling.c"), ("-ffp-contract=off",))
_TIMEOUT_S = 300


class CompileError(Exception):
    """The compiler is there and did not like a source. The text is what it said."""


@dataclass(frozen=True, slots=True)
class Level:
    """One set of instructions. needs: the words of /proc/cpuinfo without which its library must not be used."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_X86 = (
    Level("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"), _V4 | {"avx512_bf16"}),
    Level("avx2", ("-march=x86-64-v3",), _V3),
)
_ARM = (
    Level("neon-bf16", ("-march=armv8.2-a+bf16",), frozenset({"bf16"})),
    Level("neon", ("-march=armv8-a",), frozenset()),
)
_LEVELS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}


def levels(machine: str | None = None) -> tuple[Level, ...]:
    """The levels of a machine (this one if not given), best first; none for one that nobody has tried."""
    return _LEVELS.get((machine or platform.machine()).lower(), ())


def library_path(level: Level) -> Path:
    """Where the library of a level is, once it has been built."""
    return BUILT / f"{level.name}.so"


def sources_hash() -> str:
    """What libraries that were made of the present sources call themselves."""
    paths = sorted([*HERE.glob("*.[ch]"), HERE / "build.py"])
    return _digest(*(part for path in paths for part in (path.name.encode(), path.read_bytes())))


def build(report: Callable[[str], None]) -> list[Path]:
    """Compile what is not there yet; the paths of all libraries. None without a compiler, which is told to `report`.

    Ended halfway it leaves objects that the next build takes up or removes. Raises CompileError.
    """
    compiler = _compiler()
    if compiler is None:
        report("no C compiler found (cc, gcc or clang): the CPU will be used through torch alone, which is slower")
        return []
    wanted = [level for level in levels() if _takes(compiler, level)]
    if not wanted:
        report(f"no kernels for {platform.machine()} with {compiler}: the CPU will be used through torch alone, which is slower")
    libraries = [_linked(compiler, level) for level in wanted]
    for path in set(BUILT.glob("*.so")).difference(libraries):
        path.unlink(missing_ok=True)
    return libraries


def _compiler() -> str | None:
    found = (shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    return next((path for path in found if path), None)


def _takes(compiler: str, level: Level) -> bool:
    """Whether the compiler knows this level and OpenMP."""
    program = "#include <math.h>\nint main(void) { return 0; }\n"
    command = [compiler, *_FLAGS, *level.flags, "-fsyntax-only", "-x", "c", "-"]
    return subprocess.run(command, input=program, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False).returncode == 0


def _linked(compiler: str, level: Level) -> Path:
    directory = BUILT / level.name
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compiled(compiler, level, source), sorted(HERE.glob("*.c"))))
    undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    _made(library_path(level), [compiler, "-shared", *undefined, *map(str, objects), "-lm"])
    for path in set(directory.iterdir()).difference(objects):
        path.unlink(missing_ok=True)
    return library_path(level)


def _compiled(compiler: str, level: Level, source: Path) -> Path:
    """The object of one source, compiled unless it is there."""
    flags = [*_FLAGS, *level.flags, *_FLAGS_OF.get(source.name, ())]
    if source.name == "about.c":
        flags.append(f'-DBATON_SOURCES="{sources_hash()}"')
    made_of = [path.read_bytes() for path in (source, *sorted(HERE.glob("*.h")))]
    target = BUILT / level.name / f"{source.stem}-{_digest(compiler.encode(), ' '.join(flags).encode(), *made_of)}.o"
    if not target.exists():
        _made(target, [compiler, *flags, "-c", str(source)])
    return target


def _made(target: Path, command: list[str]) -> None:
    """Run a command that writes `-o` a file, and put that in its place in one go: a process may be loading the old one."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    os.replace(partial, target)


def _digest(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]


def main() -> int:
    """Build for this machine; 1 if a source does not compile, 0 also where there is no compiler."""
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
