"""Reading ``.npz`` files and folders of ``.npy`` files without unpickling anything."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.errors import DataError

FORM = "train/<modality>, test/<modality>, train/label, test/label"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file, or of a folder of ``.npy`` files, by key.

    Nothing is unpickled: an array of Python objects is refused.

    Raises:
      DataError: the path is missing, damaged, or holds something else.
    """
    if not path.exists():
        raise DataError(f"data.path: {path}: no such file or folder")
    if path.is_dir():
        found = sorted(path.rglob("*.npy"))
        if not found:
            raise DataError(f"data.path: {path}: the folder holds no .npy files; wanted {FORM}")
        names = {file.relative_to(path).with_suffix("").as_posix(): file for file in found}
        return {key: _read_array(path, key, functools.partial(_map, f)) for key, f in names.items()}
    archive = _read_array(path, "", lambda: np.load(path, allow_pickle=False))
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"data.path: {path}: a single array; wanted an .npz with the keys {FORM}")
    with archive:
        return {
            key: _read_array(path, key, functools.partial(archive.__getitem__, key))
            for key in archive.files
        }


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _read_array(path: Path, key: str, read: Callable[[], Any]) -> Any:
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
