"""House rules that a reader would otherwise have to check: sizes, names, docstrings, swallowed errors, reflection, globals.

Sizes are measured with docstrings, and over the packages only; the generated stubs are nobody's style.
"""

import ast
import os
import re
import statistics
import subprocess
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
TOPS: list[str] = PROJECT["hatch"]["build"]["targets"]["wheel"]["packages"]

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_MEDIAN_FUNCTION_LINES = 8

FORBIDDEN_WORDS = {"manager", "handler", "helper", "helpers", "util", "utils", "common", "base", "impl", "mixin", "misc"}
BROAD = {"Exception", "BaseException"}
# (file, name) of each getattr or hasattr that does not ask what something is; none so far.
REFLECTION_ALLOWED: set[tuple[str, str]] = set()
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
# In two pieces, so that this file does not trip over itself.
MACHINE_PATHS = ("/wor" + "k/", "../sha" + "red")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[str, ast.Module], Iterator[str]]


def repository_files() -> list[str]:
    """Files that are, or would be, committed; in a copy without git, everything outside hidden directories."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode == 0:
        return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    walk = (Path(where, name).relative_to(ROOT) for where, _, names in os.walk(ROOT) for name in names)
    return sorted(path.as_posix() for path in walk if not any(part.startswith(".") for part in path.parts[:-1]))


def files_under(*tops: str) -> list[str]:
    """Hand-written Python files under these directories, relative to the root."""
    found = (path.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("*.py"))
    return sorted(path for path in found if not path.startswith("baton/v1/") or path.endswith("__init__.py"))


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parsed(path: str) -> ast.Module:
    """The syntax tree; other people's escape warnings belong to the linter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def long_functions(path: str, tree: ast.Module) -> Iterator[str]:
    for node in functions(tree):
        if lines(node) > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno} {node.name} has {lines(node)} lines, {MAX_FUNCTION_LINES} are enough"


def swallowed_errors(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{path}:{node.lineno} bare except"
        elif isinstance(node, ast.ExceptHandler) and says_nothing(node.body) and names_in(node.type) & BROAD:
            yield f"{path}:{node.lineno} swallows every error"
        elif isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
            yield f"{path}:{node.lineno} except: pass; contextlib.suppress(...) names what is expected"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and names_in(*node.args) & BROAD:
            yield f"{path}:{node.lineno} suppresses every error"


def says_nothing(body: list[ast.stmt]) -> bool:
    return all(isinstance(s, ast.Pass | ast.Continue) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in body)


def names_in(*nodes: ast.AST | None) -> set[str]:
    return {n.id for node in nodes if node for n in ast.walk(node) if isinstance(n, ast.Name)}


def reflection(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and names_in(node.func) & {"getattr", "hasattr"} and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and (path, name.value) not in REFLECTION_ALLOWED:
                yield f"{path}:{node.lineno} {ast.unparse(node)} asks what something is"


def mutable_globals(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno} global {', '.join(node.names)}"
    for statement in module_level(tree.body):
        if isinstance(statement, ast.Assign | ast.AnnAssign) and is_mutable(statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for name in sorted(names_in(*targets)):
                if not name.isupper() and name != "__all__":
                    yield f"{path}:{statement.lineno} {name} is mutable and global"


def module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, also those in `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from module_level([child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)])


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1].split("[")[0] in MUTABLE_CALLS
    return isinstance(value, MUTABLE_DISPLAYS)


def missing_docstrings(path: str, tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield f"{path} does not say what it is"
    if Path(path).name.startswith("_"):
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{path}:{node.lineno} {node.name} has no docstring"


def forbidden_names(path: str, tree: ast.Module) -> Iterator[str]:
    for part in Path(path).with_suffix("").parts:
        if set(part.lower().split("_")) & FORBIDDEN_WORDS:
            yield f"{path} is named {part}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", node.name)} & FORBIDDEN_WORDS:
            yield f"{path}:{node.lineno} class {node.name}"


@pytest.mark.parametrize(
    "rule",
    [long_functions, swallowed_errors, reflection, mutable_globals, missing_docstrings, forbidden_names],
    ids=lambda rule: rule.__name__,
)
def test_packages_follow(rule: Rule) -> None:
    wrong = [line for path in files_under(*TOPS) for line in rule(path, parsed(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rule", [swallowed_errors, forbidden_names], ids=lambda rule: rule.__name__)
def test_tests_follow(rule: Rule) -> None:
    wrong = [line for path in files_under("tests") for line in rule(path, parsed(path))]
    assert not wrong, "\n".join(wrong)


def test_every_test_file_says_what_it_proves() -> None:
    wrong = [path for path in files_under("tests") if not ast.get_docstring(parsed(path))]
    assert not wrong, wrong


def test_no_file_is_long() -> None:
    sizes = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in files_under(*TOPS)}
    long = {path: size for path, size in sizes.items() if size > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines: {long}"


def test_functions_are_small_in_the_median(record_property: Callable[[str, object], None]) -> None:
    sizes = [lines(node) for path in files_under(*TOPS) for node in functions(parsed(path))]
    median = statistics.median(sizes) if sizes else 0
    record_property("median_function_lines", median)
    assert median <= MAX_MEDIAN_FUNCTION_LINES, f"the median of {len(sizes)} functions has {median} lines"


def test_proto_holds_no_python() -> None:
    assert not list((ROOT / "proto").rglob("*.py*"))


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    wrong = [f"{name}: {path}" for name in repository_files() for path in MACHINE_PATHS if path.encode() in (ROOT / name).read_bytes()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "source", "num_wrong"),
    [
        (swallowed_errors, "try: f()\nexcept: g()\n", 1),
        (swallowed_errors, "try: f()\nexcept (OSError, Exception): continue\n", 1),
        (swallowed_errors, "try: f()\nexcept KeyError: pass\n", 1),
        (swallowed_errors, "with contextlib.suppress(Exception): f()\n", 1),
        (swallowed_errors, "try: f()\nexcept Exception as error: report(error)\n", 0),
        (reflection, "hasattr(x, 'y')\ngetattr(x, 'y', None)\ngetattr(x, name)\n", 2),
        (mutable_globals, "seen = []\nif fast:\n  cache: dict = dict()\nTABLE = {}\n__all__ = []\npair = (1, 2)\n", 2),
        (mutable_globals, "def f():\n  global n\n", 1),
        (missing_docstrings, '"""Doc."""\nclass A: pass\ndef _b(): pass\n', 1),
        (forbidden_names, "class KVManager: pass\nclass HTTPHandlerX: pass\nclass Database: pass\nclass ABImpl: pass\n", 3),
        (long_functions, "def f():\n" + "  x = 1\n" * 60, 1),
    ],
)
def test_a_rule_sees_what_it_forbids(rule: Rule, source: str, num_wrong: int) -> None:
    assert len(list(rule("sample.py", ast.parse(source)))) == num_wrong
