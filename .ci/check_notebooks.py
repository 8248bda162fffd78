"""Notebooks are paired with text files, say the same as they do, and hold outputs of this text.

Usage: `python check_notebooks.py FOLDER`; one line for each fault, exit code 1 if there is any.
`python check_notebooks.py --execute FOLDER` runs every notebook and keeps its outputs.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat

LARGEST = 300_000  # bytes of a notebook, pictures included
STAMP = "outputs_of"  # in a notebook's metadata: digest of the text whose outputs it holds


def digest(content: nbformat.NotebookNode) -> str:
    """Digest of the code of a notebook."""
    code = "\0".join(cell.source.strip() for cell in content.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def execute(notebook: Path) -> None:
    """Takes the text file's cells, runs them in an empty folder of their own, keeps outputs."""
    subprocess.run(["jupytext", "--sync", str(notebook.with_suffix(".py"))], check=True)
    command = ["jupyter", "execute", "--inplace", "--timeout=900", str(notebook)]
    subprocess.run(command, check=True)
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times, which differ from run to run
    content.metadata.pop("language_info", None)
    content.metadata[STAMP] = digest(content)
    nbformat.write(content, notebook)


def faults(notebook: Path) -> list[str]:
    """What is wrong with one notebook."""
    found = []
    text = notebook.with_suffix(".py")
    if not text.exists():
        return [f"{notebook}: no text file {text.name} beside it"]
    content, paired = nbformat.read(notebook, as_version=4), jupytext.read(text)
    cells = [(cell.cell_type, cell.source.strip()) for cell in content.cells]
    if cells != [(cell.cell_type, cell.source.strip()) for cell in paired.cells]:
        found.append(f"{notebook}: differs from {text.name}; run `jupytext --sync {notebook}`")
    if content.metadata.get(STAMP) != digest(content):
        found.append(f"{notebook}: its outputs are of another text; run this file with --execute")
    for number, cell in enumerate(content.cells):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            found.append(f"{notebook}: cell {number} holds an error")
    if notebook.stat().st_size > LARGEST:
        found.append(f"{notebook}: has {notebook.stat().st_size} bytes; allowed: {LARGEST}")
    return found


def main() -> int:
    """Checks, or executes, every notebook of the folder that the command line names."""
    notebooks = sorted(Path(sys.argv[-1]).glob("*.ipynb"))
    if "--execute" in sys.argv:
        for notebook in notebooks:
            execute(notebook)
    found = [fault for notebook in notebooks for fault in faults(notebook)]
    print(*found, f"{len(notebooks)} notebooks, {len(found)} faults", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
