"""Makes a page of the site of each notebook: its text, its code and the outputs that it keeps."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parent.parent / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """A hook of MkDocs: adds the pages, their pictures and the notebooks themselves."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = path.read_text(encoding="utf-8")
        page, pictures = convert(json.loads(notebook), path.stem)
        made = {f"{path.stem}.md": page, path.name: notebook, **pictures}
        for name, content in made.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def convert(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook of that name as Markdown, and its pictures by the names that it links."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = ""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            headings = [line.lstrip("# ") for line in source.splitlines() if line.startswith("#")]
            heading = (headings or [heading])[-1]
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![{heading}: what the code above draws]({picture})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    download = f"[The notebook of this page]({name}.ipynb){{ download }}"
    return "\n\n".join([parts[0], download, *parts[1:]]), pictures
