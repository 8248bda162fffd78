"""Files that a reader finds whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from etils import epath


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file so that a reader, or a later process, sees the old content or the new.

    Args:
      path: local, or on gs://.
      content: of the file; text is written in UTF-8.

    Raises:
      OSError: it cannot be written; what was there before is there still.
    """
    path = epath.Path(path)
    # The process's number: two that write one file at a time do not mix their parts.
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if "://" not in os.fspath(path):
            commit(Path(temporary), Path(path))
        else:
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def commit(temporary: Path, path: Path) -> None:
    """Renames a local file once its content is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The file's content, or None where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
