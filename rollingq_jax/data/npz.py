"""Reading ``.npz`` files and folders of ``.npy`` files without unpickling anything."""

import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from rollingq_jax.errors import DataError

FORM = "train/<modality>, test/<modality>, train/label, test/label"


def read_arrays(path: Path | epath.Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file, or of a folder of ``.npy`` files, by key.

    Nothing is unpickled: an array of Python objects is refused. Local ``.npy`` files are
    memory-mapped, those on gs:// are read.

    Raises:
      DataError: the path is missing, damaged, or holds something else.
    """
    files = _files(path)
    if files is not None:
        if not files:
            raise DataError(f"data.path: {path}: the folder holds no .npy files; wanted {FORM}")
        names = {file.relative_to(path).with_suffix("").as_posix(): file for file in files}
        return {
            key: _read_array(path, key, functools.partial(_load, file, mmap_mode="r"))
            for key, file in names.items()
        }
    archive = _read_array(path, "", functools.partial(_load, path))
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"data.path: {path}: a single array; wanted an .npz with the keys {FORM}")
    with archive:
        return {
            key: _read_array(path, key, functools.partial(archive.__getitem__, key))
            for key in archive.files
        }


def _files(path: Path | epath.Path) -> list[Any] | None:
    """The ``.npy`` files of a folder, in order; None for a file."""
    try:
        if not path.exists():
            raise DataError(f"data.path: {path}: no such file or folder")
        if not path.is_dir():
            return None
        if isinstance(path, Path):
            return sorted(path.rglob("*.npy"))
        return sorted([*path.glob("*.npy"), *path.glob("*/*.npy")])  # all that keys can name
    except DataError:
        raise
    except Exception as error:  # without rights, without gcsfs, without a network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"data.path: {path}: cannot be reached ({reason})") from None


def _load(file: Path | epath.Path, **options: Any) -> Any:
    if isinstance(file, Path):
        return np.load(file, allow_pickle=False, **options)
    return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)


def _read_array(path: Path | epath.Path, key: str, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; its errors as one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers from Python 2, and on damaged ones
            value = read()
    except Exception as error:  # damaged archives raise almost any type
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"data.path: {path}" + (f": {key}" if key else "")
        if "allow_pickle" in reason or "Object arrays" in reason:
            raise DataError(
                f"{where}: holds Python objects (a pickle), which are refused because reading them "
                "runs code; store numbers or fixed-width strings"
            ) from None
        raise DataError(f"{where}: damaged or not a NumPy file ({reason[:200]})") from None
    if key and not isinstance(value, np.ndarray):
        raise DataError(f"data.path: {path}: {key}: not an array")
    return value
