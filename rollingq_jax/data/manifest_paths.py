"""A path that a manifest names stays inside the folder that the manifest is for."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from rollingq_jax.errors import DataError


def resolve_inside(folder: Path, root: Path, text: str, where: str) -> Path:
    """``folder / text``, if that is inside ``root`` (the folder's real path) after all links.

    Raises:
      DataError: the path is absolute, contains ``..``, or a link on it leads out of the folder.
    """
    parts = {*PurePosixPath(text).parts, *PureWindowsPath(text).parts}
    absolute = PurePosixPath(text).is_absolute() or bool(PureWindowsPath(text).anchor)
    if absolute or ".." in parts or "\0" in text:
        raise DataError(
            f"{where}: path {text!r} refused; paths are relative to the manifest and may not "
            "contain '..'"
        )
    try:
        real = Path(os.path.realpath(folder / text))
    except (OSError, ValueError):
        raise DataError(f"{where}: path {text!r} refused; not a valid path") from None
    if not real.is_relative_to(root):
        raise DataError(
            f"{where}: path {text!r} refused; a link leads out of the manifest's folder"
        )
    return folder / text


def is_file(path: Path) -> bool:
    """Whether there is such a file, as far as one can tell."""
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False
