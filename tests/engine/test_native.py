"""The kernels' library: built from the sources that are there, found by what the processor can, and refused when it is another's."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from baton.engine.devices import native
from baton.engine.devices.native import build

needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="no C compiler here")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A few of the sources elsewhere, with nothing built: all of them take a compiler a while."""
    sources = ("build.py", "about.c", "element.h", "each_element.h", "elementwise.c", "elementwise_of.h")
    target = tmp_path / "native"
    target.mkdir()
    for name in sources:
        shutil.copy(build.HERE / name, target)
    return target


def run(script: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """As `make kernels` does, in a process that knows nothing of Baton."""
    environment = None if path is None else {"PATH": path}
    return subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, timeout=100, check=False, env=environment)


def test_what_is_loaded_was_made_of_these_sources():
    if native.library() is not None:
        assert native._made_of(native.library()) == build.sources_hash()


def test_the_best_level_that_fits_is_taken():
    fitting = native.fitting()
    assert fitting == [level for level in build.levels() if level in fitting]
    if native.library() is not None:
        assert native.find().how == f"{fitting[0].name} kernels"


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
def test_levels_need_less_and_less(machine):
    needs = [level.needs for level in build.levels(machine)]
    assert needs and all(after < before for before, after in pairwise(needs))


def test_an_unknown_machine_has_none():
    assert build.levels("pdp11") == ()


@needs_compiler
def test_what_has_not_changed_is_not_compiled_again(copy):
    first = run(copy / "build.py")
    assert first.returncode == 0, first.stderr
    objects = {path: path.stat().st_mtime_ns for path in (copy / "built").glob("*/*.o")}
    (copy / "elementwise.c").write_text((copy / "elementwise.c").read_text(encoding="utf-8") + "/* changed */\n", encoding="utf-8")
    assert run(copy / "build.py").returncode == 0
    kept = {path.name.rsplit("-", 1)[0] for path, made in objects.items() if path.exists() and path.stat().st_mtime_ns == made}
    compiled = {path.name.rsplit("-", 1)[0] for path in objects} - kept
    assert objects and compiled == {"elementwise", "about"}
    assert len(list((copy / "built").glob("*/*.o"))) == len(objects)


@needs_compiler
def test_a_source_that_does_not_compile_is_an_error(copy):
    (copy / "elementwise.c").write_text("int broken(void) { return }\n", encoding="utf-8")
    done = run(copy / "build.py")
    assert done.returncode == 1 and "elementwise.c" in done.stderr


def test_without_a_compiler_it_says_so_and_is_no_error(copy, tmp_path):
    done = run(copy / "build.py", path=str(tmp_path))
    assert done.returncode == 0 and "no C compiler" in done.stdout
    assert not (copy / "built").exists()


@needs_compiler
@pytest.mark.skipif(not native.fitting(), reason="no kernels for this processor")
def test_a_library_of_other_sources_is_refused(copy):
    (copy / "about.c").write_text((copy / "about.c").read_text(encoding="utf-8") + "/* changed */\n", encoding="utf-8")
    assert run(copy / "build.py").returncode == 0
    with pytest.raises(OSError, match="was made of other sources"):
        native.opened(copy / "built" / f"{native.fitting()[0].name}.so")


def test_a_library_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OSError, match="make kernels"):
        native.opened(tmp_path / "none.so")
