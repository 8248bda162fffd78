"""Notebooks and their text files say the same, and hold the outputs of this text."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKER = ROOT / ".ci" / "check_notebooks.py"


def test_there_are_four():
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["01_rotation", "02_av_digits", "03_your_model", "04_paper"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_text_file_agrees_and_outputs_are_of_this_text(path):
    pytest.importorskip("jupytext")
    assert runpy.run_path(str(CHECKER))["faults"](path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_cell_says_how_to_install_and_does_nothing(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    assert all(line.startswith("#") for line in first["source"])
    assert any("pip install" in line for line in first["source"])


def test_your_model_needs_nothing_but_the_wheel():
    text = (ROOT / "notebooks" / "03_your_model.py").read_text(encoding="utf-8")
    lines = [line.split()[1] for line in text.splitlines() if line.startswith(("import", "from"))]
    assert {name.split(".")[0] for name in lines} == {
        "flax", "jax", "matplotlib", "numpy", "optax", "rollingq_jax",
    }  # fmt: skip
