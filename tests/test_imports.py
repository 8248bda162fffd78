"""The map of the code in README.md holds, and the core stays light.

The map lists the files and folders of the package in order: a line imports from those above it.
"""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rollingq_jax"
CORE = ("errors", "shapes", "rotation", "rolling", "attention", "watching", "quality", "models")
CORE_REQUIREMENTS = {"jax", "flax", "optax", "chex", "numpy"}
NOT_IN_CORE = (
    "absl",
    "av",
    "equinox",
    "espeakng_loader",
    "grain",
    "matplotlib",
    "ml_collections",
    "orbax",
    "PIL",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
)
# Packages that the core's own requirements may load by themselves, so that blocking them proves
# nothing about our code.
LOADED_BY_REQUIREMENTS = {"absl", "scipy"}


def read_map() -> list[list[str]]:
    """Files and folders of the package, without endings, line by line, as README.md maps them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^rollingq_jax/\n(.*?)^\S", text, flags=re.MULTILINE | re.DOTALL)
    assert block, "README.md has no map of the code"
    lines = [
        re.findall(r"(?<=[ ])([a-z_]+)(?:\.py|/)(?=[ ])", f"{line} ")
        for line in (re.split(r"(?<=\S) {3,}", line)[0] for line in block.group(1).splitlines())
    ]
    return [line for line in lines if line]


def source_modules() -> dict[str, Path]:
    """Every module but the packages' ``__init__``, by its dotted name within the package."""
    top = ROOT / PACKAGE
    files = (path for path in sorted(top.rglob("*.py")) if path.name != "__init__.py")
    return {".".join(path.relative_to(top).with_suffix("").parts): path for path in files}


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The module that ``from ... import`` names, relative imports resolved."""
    if not node.level:
        return node.module or ""
    parts = f"{PACKAGE}.{module}".split(".") if module else [PACKAGE]
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join(base + ([node.module] if node.module else []))


def imported(path: Path, module: str, known: set[str]) -> set[str]:
    """Names of the package's own modules (or subpackages) that a file imports, lazily too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, path.name == "__init__.py")
            names |= {
                f"{base}.{alias.name}" if is_known(f"{base}.{alias.name}", known) else base
                for alias in node.names
            }
    prefix = f"{PACKAGE}."
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return own | ({""} if PACKAGE in names else set())


def is_known(name: str, known: set[str]) -> bool:
    """Whether a dotted name is one of our modules or a package that holds some."""
    short = name.removeprefix(f"{PACKAGE}.")
    return any(module == short or module.startswith(f"{short}.") for module in known)


def place(module: str, order: list[list[str]]) -> int:
    """Line of the map that a module, or a package, stands in; the root is the last of the core."""
    top = module.split(".")[0] or CORE[-1]
    found = [number for number, line in enumerate(order) if top in line]
    assert found, f"{module} is not on README's map of the code"
    return found[0]


def third_party(path: Path) -> set[str]:
    """Top-level names that a file imports, less ours and the standard library's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {PACKAGE}


def test_the_map_lists_every_file_and_folder_once():
    listed = [name for line in read_map() for name in line]
    assert sorted(listed) == sorted({module.split(".")[0] for module in source_modules()})


@pytest.mark.parametrize("module", sorted(source_modules()))
def test_modules_import_only_from_the_lines_above_and_their_own(module):
    order, known = read_map(), set(source_modules())
    here = place(module, order)
    below = {n for n in imported(source_modules()[module], module, known) if place(n, order) > here}
    assert not below, f"{module} imports {sorted(below)}, which README's map puts below it"


def test_no_module_imports_itself_by_way_of_others():
    files = source_modules()
    known = set(files)
    graph = {name: imported(path, name, known) & known for name, path in files.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError and names the cycle


@pytest.mark.parametrize(
    "module", sorted(name for name in source_modules() if name.split(".")[0] in CORE)
)
def test_core_modules_need_only_the_core_requirements(module):
    assert third_party(source_modules()[module]) <= CORE_REQUIREMENTS


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that runs the code in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_heavy_package():
    code = f"import sys, {PACKAGE}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = set(run_python(code).split())
    assert not loaded & (set(NOT_IN_CORE) - LOADED_BY_REQUIREMENTS)


@pytest.mark.parametrize(
    "name", ["convert.from_upstream", "train.default_config", "train.train_and_evaluate", "load"]
)
def test_what_is_imported_on_first_use_is_found(name):
    """In a fresh interpreter, where nothing else has imported the module before."""
    code = f"""
import sys, {PACKAGE} as rq
print({PACKAGE + "." + name.split(".")[0]!r} in sys.modules, rq.{name}.__name__)
"""
    assert run_python(code).split() == ["False", name.split(".")[-1]]


def test_core_works_where_nothing_else_is_installed():
    blocked = sorted(set(NOT_IN_CORE) - LOADED_BY_REQUIREMENTS)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # importing one of these now raises ImportError
import jax, jax.numpy as jnp
import {PACKAGE} as rq
config = {{"fusion": "attention", "num_classes": 3, "dim": 16, "depth": 1, "num_heads": 2,
          "encoders": {{"audio": {{"kind": "vector"}}, "visual": {{"kind": "vector"}}}}}}
model = rq.build_model(config)
batch = {{"audio": jnp.ones((2, 5)), "visual": jnp.ones((2, 7)), "label": jnp.zeros(2, jnp.int32)}}
logits, out = model.apply(model.init(jax.random.key(0), batch), batch)
print(logits.shape, sorted(out["mean_keys"]))
"""
    assert run_python(code).strip() == "(2, 3) ['audio', 'visual']"
