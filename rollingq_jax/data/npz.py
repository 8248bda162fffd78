"""Reading ``.npz`` files and folders of ``.npy`` files without unpickling anything.

What is in a file is known from the archive's directory and the arrays' headers, before anything is
unpacked: a file of a few megabytes may hold gigabytes.
"""

import dataclasses
import functools
import io
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from rollingq_jax.data.reading import check_lfs_pointer
from rollingq_jax.errors import DataError

FORM = "train/<modality>, test/<modality>, train/label, test/label"
MOST_DEFLATED = 1100  # bytes that a deflated byte can stand for: 1032, and some at the ends


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in an archive, not unpacked yet.

    Attributes:
      shape, dtype: as its header says; the archive has room for that.
      read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes when unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


def read_arrays(path: Path | epath.Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file, or of a folder of ``.npy`` files, by key.

    Nothing is unpickled: an array of Python objects is refused. Local ``.npy`` files are
    memory-mapped, those on gs:// are read. bfloat16, which NumPy's format writes as ``V2``, is read
    as such.

    Raises:
      DataError: the path is missing, damaged, holds something else, or more than the memory.
    """
    arrays = open_arrays(path)
    check_memory(arrays.values())
    return {key: unpacked(array) for key, array in arrays.items()}


def unpacked(array: np.ndarray | StoredArray) -> np.ndarray:
    """The array itself."""
    return array.read() if isinstance(array, StoredArray) else array


def check_memory(arrays: Iterable[np.ndarray | StoredArray]) -> None:
    """Refuses what cannot be unpacked on this machine.

    Raises:
      DataError: the arrays have more bytes than the machine's memory.
    """
    wanted = sum(array.nbytes for array in arrays if isinstance(array, StoredArray))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return
    if wanted > memory:
        raise DataError(
            f"data.path: {wanted / 2**30:.1f} GiB when unpacked, but this machine has "
            f"{memory / 2**30:.1f} GiB of memory; use a folder of .npy files, which are mapped"
        )


def open_arrays(path: Path | epath.Path) -> dict[str, np.ndarray | StoredArray]:
    """As :func:`read_arrays`, but what is in an archive is not unpacked yet.

    Raises:
      DataError: the path is missing or damaged, or holds something else.
    """
    files = _files(path)
    if files is not None:
        if not files:
            raise DataError(f"data.path: {path}: the folder holds no .npy files; wanted {FORM}")
        names = {file.relative_to(path).with_suffix("").as_posix(): file for file in files}
        return {
            key: _numbers(_guarded(path, key, functools.partial(_load, file)), path, key)
            for key, file in names.items()
        }
    content = _guarded(path, "", path.read_bytes) if not isinstance(path, Path) else None
    file = path if content is None else io.BytesIO(content)
    start = _guarded(path, "", functools.partial(_start, file))
    check_lfs_pointer(start, f"data.path: {path}")
    if start.startswith(b"\x93NUMPY"):
        raise DataError(f"data.path: {path}: a single array; wanted an .npz with the keys {FORM}")
    if not start.startswith(b"PK"):  # nothing that can be read, and NumPy says what it is
        _guarded(path, "", functools.partial(np.load, file, allow_pickle=False))
        raise DataError(f"data.path: {path}: damaged or not a NumPy file")
    archive = _guarded(path, "", functools.partial(zipfile.ZipFile, file))
    members = archive.infolist()
    keys = [member.filename.removesuffix(".npy") for member in members]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"data.path: {path}: two arrays have the name {twice!r}")
    return {
        key: _guarded(path, key, functools.partial(_stored, archive, member, path, key))
        for key, member in zip(keys, members, strict=True)
    }


def _start(file: Path | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:64]
    with open(file, "rb") as opened:
        return opened.read(64)


def _stored(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path | epath.Path, key: str
) -> StoredArray:
    """A member by its header, which must fit the directory's sizes."""
    if not member.filename.endswith(".npy"):
        raise DataError(f"data.path: {path}: {key!r}: not an array")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:  # version 3 is for names of fields alone
            raise ValueError(f"a structured array, or a format of version {version}")
        shape, _, dtype = read_header(file)
        head = file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {list(shape)}")
    claimed = head + math.prod(shape) * dtype.itemsize
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    if claimed != member.file_size or (
        deflated and member.file_size > MOST_DEFLATED * (member.compress_size + 1)
    ):
        raise ValueError(
            f"{dtype}{list(shape)} would be {claimed} bytes; the archive holds {member.file_size}, "
            f"packed into {member.compress_size}"
        )

    def read() -> np.ndarray:
        def unpack() -> np.ndarray:
            with archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)

        return _numbers(_guarded(path, key, unpack), path, key)

    return StoredArray(shape, _numbers(np.empty(0, dtype), path, key).dtype, read)


def _numbers(array: np.ndarray, path: Path | epath.Path, key: str) -> np.ndarray:
    """The array, where NumPy's format has kept what its values are; bfloat16 by its size."""
    if array.dtype.kind != "V":
        return array
    if array.dtype.names is not None or array.dtype.subdtype is not None:
        why = "a structured array; store an array for each field"
    elif array.dtype.itemsize == 2:
        values = array.view(jnp.bfloat16)
        return values if isinstance(array, np.memmap) else values.astype(np.float32)
    elif array.dtype.itemsize == 1:
        why = "float8 or int4, of which NumPy's format does not keep which; store it as float32"
    else:
        why = "raw bytes; store numbers"
    raise DataError(f"data.path: {path}: {key!r}: dtype {array.dtype.str} is {why}")


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


def _load(file: Path | epath.Path) -> np.ndarray:
    if isinstance(file, Path):
        check_lfs_pointer(file)
        return np.load(file, allow_pickle=False, mmap_mode="r")
    content = file.read_bytes()
    check_lfs_pointer(content, file)
    return np.load(io.BytesIO(content), allow_pickle=False)


def _guarded(path: Path | epath.Path, key: str, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; its errors as one line."""
    where = f"data.path: {path}" + (f": {key!r}" if key else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers from Python 2, and on damaged ones
            return read()
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{where}: does not fit into memory") from None
    except Exception as error:  # damaged archives raise almost any type
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason or "Object arrays" in reason or "Python objects" in reason:
            raise DataError(
                f"{where}: holds Python objects (a pickle), which are refused because reading them "
                "runs code; store numbers or fixed-width strings"
            ) from None
        raise DataError(f"{where}: damaged or not a NumPy file ({reason[:200]})") from None
