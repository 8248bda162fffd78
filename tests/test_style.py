"""House-keeping that no linter holds: docstrings and annotations."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path
    for pattern in ("train.py", "rollingq_jax/**/*.py", "benchmarks/**/*.py", "configs/**/*.py")
    for path in ROOT.glob(pattern)
)


def name_of(path: Path) -> str:
    """Path within the repository, for messages."""
    return path.relative_to(ROOT).as_posix()


def is_public(name: str) -> bool:
    """No part of the dotted name starts with an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


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
