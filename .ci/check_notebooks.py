"""Notebooks are paired with text files, say the same as they do, and hold no outputs.

Usage: ``python check_notebooks.py FOLDER``; one line for each fault, exit code 1 if there is any.
"""

import sys
from pathlib import Path

import jupytext


def faults(notebook: Path) -> list[str]:
    """What is wrong with one notebook."""
    found = []
    content = jupytext.read(notebook)
    text = notebook.with_suffix(".py")
    if not text.exists():
        return [f"{notebook}: no text file {text.name} beside it"]
    paired = jupytext.read(text)
    cells = [(cell.cell_type, cell.source.strip()) for cell in content.cells]
    if cells != [(cell.cell_type, cell.source.strip()) for cell in paired.cells]:
        found.append(f"{notebook}: differs from {text.name}; run `jupytext --sync {notebook}`")
    for number, cell in enumerate(content.cells):
        if cell.get("outputs") or cell.get("execution_count"):
            found.append(f"{notebook}: cell {number} holds an output; clear it")
    return found


def main() -> int:
    """Check every notebook of the folder that the command line names."""
    notebooks = sorted(Path(sys.argv[1]).glob("*.ipynb"))
    found = [fault for notebook in notebooks for fault in faults(notebook)]
    print(*found, f"{len(notebooks)} notebooks, {len(found)} faults", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
