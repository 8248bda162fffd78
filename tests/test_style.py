"""House-keeping that no linter holds: sizes, docstrings, annotations."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES = 275
FUNCTION_LINES = 65  # below the docstring
# Functions that may be longer, each with its reason.
LONG_FUNCTIONS: dict[str, str] = {
    "rollingq_jax/train/config.py:default_config": "a table of fields and their defaults",
}

FILES = sorted(
    path
    for pattern in ("train.py", "rollingq_jax/**/*.py", "benchmarks/**/*.py", "configs/**/*.py")
    for path in ROOT.glob(pattern)
)


def name_of(path: Path) -> str:
    """Path within the repository, for messages."""
    return path.relative_to(ROOT).as_posix()


def functions(path: Path):
    """Pairs of qualified name and node for every function and method, nested ones too."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            name = f"{prefix}{child.name}" if named else prefix
            if named and not isinstance(child, ast.ClassDef):
                yield name, child
            yield from walk(child, f"{name}." if named else prefix)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "")


def is_public(name: str) -> bool:
    """No part of the dotted name starts with an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MODULE_LINES, f"{name_of(path)} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path):
    for name, node in functions(path):
        documented = ast.get_docstring(node) is not None
        lines = node.end_lineno - (node.body[0].end_lineno if documented else node.lineno - 1)
        allowed = f"{name_of(path)}:{name}" in LONG_FUNCTIONS
        assert lines <= FUNCTION_LINES or allowed, f"{name} has {lines} lines"


def test_the_list_of_long_functions_is_not_stale():
    known = {f"{name_of(path)}:{name}" for path in FILES for name, _ in functions(path)}
    assert set(LONG_FUNCTIONS) <= known
    assert all(LONG_FUNCTIONS.values()), "each exception needs its reason"


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name != "configs"], ids=name_of)
def test_public_functions_are_documented_and_annotated(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    top = {node for node in tree.body if isinstance(node, ast.FunctionDef)}
    methods = {
        node
        for cls in tree.body
        if isinstance(cls, ast.ClassDef) and is_public(cls.name)
        for node in cls.body
        if isinstance(node, ast.FunctionDef)
    }
    for node in top | methods:
        if not is_public(node.name) or node.name == "setup":  # Flax defines what `setup` is
            continue
        overload = any("overload" in ast.unparse(mark) for mark in node.decorator_list)
        assert overload or ast.get_docstring(node), f"{node.name} has no docstring"
        assert node.returns is not None, f"{node.name} does not say what it returns"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{node.name} leaves {bare} without a type"
